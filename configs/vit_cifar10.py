"""ViT of 6 blocks with patches of 4 on CIFAR-10 (TFDS `cifar10`), from scratch."""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    config = cifar10.from_scratch()
    config.model.update(name="vit_6x256", patch_size=4, dtype="bfloat16", projection_dropout=0.0)
    config.model.update(embedding_dropout=0.1, attention_dropout=0.1, dropout=0.1)
    config.update(batch_size=128, epochs=200.0)
    config.augment.update(rotate=36.0, zoom=0.1, reprob=0.0)
    config.optimizer.update(warmup_epochs=10.0, warmup_learning_rate=0.0, ema_decay=0.0)
    config.optimizer.final_learning_rate = 1e-8
    return config
