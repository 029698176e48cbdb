"""ViT of 6 blocks with patches of 4 on CIFAR-10 (TFDS `cifar10`), from scratch."""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    config = cifar10.from_scratch()
    config.model.name = "vit_6x256"
    config.model.patch_size = 4
    config.model.dtype = "bfloat16"
    config.model.embedding_dropout = 0.1
    config.model.attention_dropout = 0.1
    config.model.dropout = 0.1
    config.model.projection_dropout = 0.0
    config.batch_size = 128
    config.epochs = 200.0
    config.augment.rotate = 36.0
    config.augment.zoom = 0.1
    config.augment.reprob = 0.0
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.warmup_learning_rate = 0.0
    config.optimizer.final_learning_rate = 1e-8
    config.optimizer.ema_decay = 0.0
    return config
