"""What each key of a config may be: the one table that the command line and the check before a run read.

A new key of `defaults.py` needs one row here.
"""

import dataclasses
from collections.abc import Mapping

from cait_jax.data.decode import RESIZES
from cait_jax.kernels.talking_heads import IMPLEMENTATIONS
from cait_jax.models.residual import CLASS_TOKENS, DROP_PATH_GROWTHS, REMATS, SCHEMES
from cait_jax.models.zoo import FLOAT_DTYPES, VARIANTS
from cait_jax.train.optimizer import OPTIMIZERS, SCHEDULES
from cait_jax.train.rules import INT32, Flag, Number, Numbers, Rule, Size, Text, Words

_EPOCHS = 1e6

_COUNT = Number(1, INT32, whole=True)
_FROM_0 = Number(0, INT32, whole=True)
_SOME = dataclasses.replace(_COUNT, optional=True)
_NOT_NEGATIVE = Number(0)
_POSITIVE = Number(0, above=True)
_BELOW_1 = Number(0, 1, below=True)
_SHARE = Number(0, 1)
_PART = Number(0, 1, above=True)
_DTYPE = Words(FLOAT_DTYPES)

RULES: Mapping[str, Rule] = {
    "seed": Number(0, 2**32 - 1, whole=True),  # JAX takes it modulo 2**32
    "batch_size": _COUNT,
    "epochs": Number(0, _EPOCHS, above=True),
    "steps": _SOME,
    "image_size": Size(),
    "model.name": Words(tuple(VARIANTS)),
    "model.width": _SOME,
    "model.depth": _SOME,
    "model.num_heads": _SOME,
    "model.patch_size": _SOME,
    "model.mlp_ratio": Number(0, above=True, optional=True),
    "model.residual": Words(tuple(SCHEMES), optional=True),
    "model.block_norm": Flag(optional=True),
    "model.layer_scale_init": Number(optional=True),
    "model.talking_heads": Flag(optional=True),
    "model.class_token": Words(CLASS_TOKENS, number=_FROM_0, optional=True),
    "model.class_depth": dataclasses.replace(_FROM_0, optional=True),
    "model.class_mlp_ratio": Number(0, optional=True),
    "model.distilled": Flag(optional=True),
    "model.drop_path_rate": dataclasses.replace(_BELOW_1, optional=True),
    "model.drop_path_growth": Words(DROP_PATH_GROWTHS, optional=True),
    "model.embedding_dropout": _BELOW_1,
    "model.attention_dropout": _BELOW_1,
    "model.projection_dropout": dataclasses.replace(_BELOW_1, optional=True),
    "model.dropout": _BELOW_1,
    "model.dtype": _DTYPE,
    "model.param_dtype": _DTYPE,
    "model.precision": Words(("default", "high", "highest"), optional=True),
    "model.remat": Words(REMATS),
    "model.attention": Words(tuple(IMPLEMENTATIONS), optional=True),
    "model.stacked": Flag(),
    "init.weights": Text(optional=True),
    "init.pretrained": Flag(),
    "init.reset_head": Flag(),
    "init.ema": Flag(),
    "data.name": Text(),
    "data.data_dir": Text(optional=True),
    "data.train_split": Text(),
    "data.eval_split": Text(),
    "data.mean": Numbers(Number(), (1, 3), (0.485, 0.456, 0.406)),
    "data.std": Numbers(_POSITIVE, (1, 3), (0.229, 0.224, 0.225)),
    "data.aug_repeats": _COUNT,
    "data.balanced": Flag(),
    "data.workers": Number(0, 1024, whole=True),
    "data.resize": Words(RESIZES),
    "augment.scale": Numbers(_PART, (2,), (0.08, 1.0), increasing=True),
    "augment.ratio": Numbers(_POSITIVE, (2,), (0.75, 1.33), increasing=True),
    "augment.simple_crop": Flag(),
    "augment.hflip": Flag(),
    "augment.pad_crop": Number(0, 2**14, whole=True),
    "augment.rotate": Number(0, 180),
    "augment.zoom": _BELOW_1,
    "augment.shear": _NOT_NEGATIVE,
    "augment.translate": _SHARE,
    "augment.rand_augment": Text(),
    "augment.three_augment": Flag(),
    "augment.color_jitter": _NOT_NEGATIVE,
    "augment.reprob": _SHARE,
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.mixup_prob": _SHARE,
    "augment.mixup_switch_prob": _SHARE,
    "augment.mix_rows": Number(0, INT32, whole=True),
    "loss.name": Words(("softmax", "binary")),
    "loss.smoothing": _BELOW_1,
    "loss.target_threshold": dataclasses.replace(_BELOW_1, optional=True),
    "distill.kind": Words(("none", "hard", "soft")),
    "distill.teacher": Text(),
    "distill.weights": Text(optional=True),
    "distill.logits": Text(optional=True),
    "distill.alpha": _SHARE,
    "distill.temperature": _POSITIVE,
    "optimizer.name": Words(OPTIMIZERS),
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.reference_batch": _FROM_0,
    "optimizer.warmup_epochs": Number(0, _EPOCHS),
    "optimizer.warmup_learning_rate": _NOT_NEGATIVE,
    "optimizer.final_learning_rate": _NOT_NEGATIVE,
    "optimizer.schedule": Words(SCHEDULES),
    "optimizer.decay_epochs": Number(0, _EPOCHS, above=True, optional=True),
    "optimizer.decay_rate": dataclasses.replace(_PART, optional=True),
    "optimizer.per_epoch": Flag(),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.b1": _BELOW_1,
    "optimizer.b2": _BELOW_1,
    "optimizer.eps": Number(0, above=True, optional=True),
    "optimizer.momentum": _BELOW_1,
    "optimizer.nesterov": Flag(),
    "optimizer.layer_decay": _PART,
    "optimizer.train": Words(("all", "head", "class_attention"), number=_FROM_0),
    "optimizer.sam_rho": _NOT_NEGATIVE,
    "optimizer.grad_clip_norm": Number(0, optional=True),
    "optimizer.grad_accum": _COUNT,
    "optimizer.ema_decay": _BELOW_1,
    "phases.head_epochs": Number(0, _EPOCHS),
    "phases.head_learning_rate": _NOT_NEGATIVE,
    "phases.blocks": _FROM_0,
    "phases.blocks_epochs": Number(0, _EPOCHS, above=True),
    "phases.blocks_learning_rate": _NOT_NEGATIVE,
    "mesh.data": Number(1, INT32, whole=True, also=-1),
    "mesh.fsdp": Number(1, INT32, whole=True, also=-1),
    "mesh.tensor": Number(1, INT32, whole=True, also=-1),
    "eval.batch_size": _COUNT,
    "eval.every_epochs": Number(0, 1e9, above=True),
    "eval.crop_pct": _PART,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep": _COUNT,
    "report.every_steps": _COUNT,
    "report.tensorboard": Flag(),
}
