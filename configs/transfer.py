"""Transfer of released weights to another data set, at 224 pixels.

The numbers are the author's for DeiT's base model (facebookresearch/deit, issues 45 and 105); he named none
for CaiT.
"""

from ml_collections import ConfigDict

from configs import imagenet


def pretrained() -> ConfigDict:
    """Starts from released weights with a new head; the ImageNet recipe goes on otherwise.

    To start from a run instead: `--config.init.pretrained=False --config.init.weights=runs/cait_s24
    --config.model.name=cait_s24`.
    """
    config = imagenet.recipe("cait_s24_224")
    config.init.pretrained = True
    config.init.reset_head = True
    config.batch_size = 768
    config.optimizer.reference_batch = 0  # the learning rates are for this batch size
    return config


def with_sgd() -> ConfigDict:
    """The author's settings for CIFAR-10 and Cars: SGD, 1000 epochs, no erasing, no drop path."""
    config = pretrained()
    config.epochs = 1000.0
    config.model.drop_path_rate = 0.0
    config.augment.reprob = 0.0
    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True  # as timm's --opt sgd
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 1e-4
    config.optimizer.ema_decay = 0.0  # so slow an average would still be near its start at the end
    return config
