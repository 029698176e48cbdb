"""CaiT-S24's released weights on another data set of TFDS at 224 pixels: `:cars`, `:cifar10`, `:flowers` ...

The numbers are the author's for DeiT's base model (facebookresearch/deit, issues 45 and 105), for CIFAR-10, Cars
and iNaturalist; he named none for CaiT. CIFAR-100 and Flowers take those of CIFAR-10.

To start from a run instead: `--config.init.pretrained=False --config.init.weights=runs/cait_s24
--config.model.name=cait_s24`.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument
from configs import imagenet

# Argument to data set, the splits for training and evaluation, and epochs between evaluations.
DATA = {
    "cars": ("cars196", "train", "test", 20.0),
    "cifar10": ("cifar10", "train", "test", 10.0),
    "cifar100": ("cifar100", "train", "test", 10.0),
    "flowers": ("oxford_flowers102", "train+validation", "test", 100.0),  # 2,040 images
    "inaturalist": ("i_naturalist2018", "train", "validation", 1.0),
}


def get_config(argument: str = "") -> ConfigDict:
    check_argument("transfer", argument, tuple(DATA))
    config = imagenet.recipe("cait_s24_224")
    config.init.pretrained = True
    config.init.reset_head = True
    config.batch_size = 768
    config.optimizer.reference_batch = 0  # the learning rates are for this batch size
    name, train_split, eval_split, every_epochs = DATA[argument]
    config.data.name = name
    config.data.train_split, config.data.eval_split = train_split, eval_split
    config.eval.every_epochs = every_epochs
    if argument == "inaturalist":
        config.epochs = 360.0
        config.model.drop_path_rate = 0.1
        config.augment.reprob = 0.1
        config.optimizer.learning_rate = 7.5e-5
        return config
    config.epochs = 1000.0
    config.model.drop_path_rate = 0.0
    config.augment.reprob = 0.0
    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True  # as timm's --opt sgd
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 1e-4
    config.optimizer.ema_decay = 0.0  # so slow an average would still be near its start at the end
    return config
