"""Every key of a config: default, kind of value and meaning in one table; `config` reads and checks values by it.

The defaults are the paper's ImageNet recipe (Touvron et al., arXiv 2103.17239, after DeiT's) with a rate for
every step; `configs/imagenet.py` adds the authors' rate for every epoch.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cait_jax.data.decode import RESIZES
from cait_jax.errors import UserError, nearest, setting
from cait_jax.kernels import IMPLEMENTATIONS
from cait_jax.models.cait import REMATS
from cait_jax.models.residual import CLASS_TOKENS, DROP_PATH_GROWTHS, SCHEMES
from cait_jax.models.variants import VARIANTS
from cait_jax.models.zoo import FLOAT_DTYPES
from cait_jax.train.objectives import OBJECTIVES
from cait_jax.train.optimizer import OPTIMIZERS, SCHEDULES

INT32 = 2**31 - 1
_FEW = 12  # words that a sentence lists
_LONG = 80  # characters of a wrong value that it shows


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, which `above` and `below` exclude, or `also`."""

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    also: int | None = None


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of numbers; on a command line with or without brackets."""

    each: Number
    counts: tuple[int, ...]
    example: str
    increasing: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """A side in pixels, or (height, width)."""

    side: Number
    both: Several


@dataclasses.dataclass(frozen=True)
class Words:
    """One of some words; with `count`, also a whole number written as a word."""

    known: Sequence[str]
    count: Number | None = None


@dataclasses.dataclass(frozen=True)
class Name:
    """Text that is not empty."""


# What a value may be; `str` is any text, `bool` a flag.
Kind = Number | Several | Size | Words | Name | type[str] | type[bool]


class Key(NamedTuple):
    """A key; one whose default is None may be None."""

    default: Any
    kind: Kind
    meaning: str


COUNT, FROM_0 = Number(1, INT32, whole=True), Number(0, INT32, whole=True)
SIDE = Number(1, 2**14, whole=True)
SIZE = Size(SIDE, Several(SIDE, (2,), "224,192"))
# Float32 holds all of these, and what a step makes of them. Below the least of some a run would do nothing.
NORM, RATE = Number(0, 1e6), Number(0, 1e3)
SCALE, ALPHA = Number(1e-3, 1e3), Number(1e-3, 1e3, also=0)
BLOCKS, BLOCKS_FROM_0 = Number(1, 1024, whole=True), Number(0, 1024, whole=True)
EPOCHS = Number(0, 1e6, above=True)
BELOW_1, SHARE, PART = Number(0, 1, below=True), Number(0, 1), Number(1e-3, 1)
DTYPE = Words(FLOAT_DTYPES)
DEVICES = Number(1, INT32, whole=True, also=-1)
WAIT = Number(0, 1e6, above=True)
TOKEN = Words(CLASS_TOKENS, count=FROM_0)
NAME = Name()
TRAINED = Words(("all", "head", "class_attention"), count=FROM_0)
CHANNELS = Several(Number(-1e3, 1e3), (1, 3), "0.485,0.456,0.406")
POSITIVE_CHANNELS = Several(SCALE, (1, 3), "0.229,0.224,0.225")
CROP_SCALE = Several(PART, (2,), "0.08,1", increasing=True)
CROP_RATIO = Several(SCALE, (2,), "0.75,1.33", increasing=True)

# fmt: off
KEYS: Mapping[str, Key] = {
    "objective": Key("supervised", Words(OBJECTIVES), "what is learnt: labels, masked patches, self-distillation"),
    "seed": Key(0, Number(0, 2**32 - 1, whole=True), "every random draw of the run follows from it and the step"),
    "batch_size": Key(1024, COUNT, "images a step, over all devices and processes"),
    "epochs": Key(400.0, EPOCHS, "passes over the training split"),
    "steps": Key(None, COUNT, "length of the run in steps instead"),
    "image_size": Key(224, SIZE, "side in pixels, or height and width"),
    "model.name": Key("cait_xs24", Words(tuple(VARIANTS)), "a name of cait_jax.list_models()"),
    "model.width": Key(None, COUNT, "channels of a token; None, here and below: the named model's"),
    "model.depth": Key(None, BLOCKS, "self-attention blocks"),
    "model.num_heads": Key(None, COUNT, "heads of both kinds of attention"),
    "model.patch_size": Key(None, COUNT, "side of a patch in pixels"),
    "model.mlp_ratio": Key(None, SCALE, "hidden width of the MLPs over the width"),
    "model.residual": Key(None, Words(tuple(SCHEMES)), "scheme of the residual branches"),
    "model.block_norm": Key(None, bool, "normalise residual branches"),
    "model.layer_scale_init": Key(None, Number(-1e3, 1e3), "initial value of LayerScale's gammas, or of scalars"),
    "model.talking_heads": Key(None, bool, "mix the heads of self-attention"),
    "model.class_token": Key(None, TOKEN, "class_attention, input, mean, or the number of the block it joins at"),
    "model.class_depth": Key(None, BLOCKS_FROM_0, "class-attention blocks"),
    "model.class_mlp_ratio": Key(None, ALPHA, "mlp_ratio of the class-attention blocks; 0: no MLP"),
    "model.distilled": Key(None, bool, "a second token and head, for a teacher"),
    "model.class_position": Key(None, bool, "of a ViT: position embedding of class token and registers"),
    "model.registers": Key(None, BLOCKS_FROM_0, "of a ViT: tokens after the class token, which no head reads"),
    "model.mean_pool": Key(None, bool, "of a ViT: the head reads the mean patch, normalised after the mean"),
    "model.swiglu": Key(None, bool, "of a ViT: gated MLPs (SwiGLU)"),
    "model.drop_path_rate": Key(None, BELOW_1, "stochastic-depth rate"),
    "model.drop_path_growth": Key(None, Words(DROP_PATH_GROWTHS), "of the rate over the depth"),
    "model.embedding_dropout": Key(0.0, BELOW_1, "dropout after the position embedding"),
    "model.attention_dropout": Key(0.0, BELOW_1, "dropout on attention weights"),
    "model.projection_dropout": Key(None, BELOW_1, "dropout after attention's projection; None: model.dropout"),
    "model.dropout": Key(0.0, BELOW_1, "dropout in MLPs"),
    "model.dtype": Key("float32", DTYPE, "of the computation"),
    "model.param_dtype": Key("float32", DTYPE, "of parameters, optimiser state and EMA"),
    "model.precision": Key(None, Words(("default", "high", "highest")), "of matmuls; None: JAX's default"),
    "model.remat": Key("none", Words(REMATS), "what is rematerialised in the backward pass"),
    "model.attention": Key(None, Words(IMPLEMENTATIONS), "implementation; None: the best known here"),
    "model.stacked": Key(True, bool, "blocks in one nn.scan, which compiles fast"),
    # where a run starts without a checkpoint of its own: these, then initialisation from the seed
    "init.weights": Key(None, NAME, "weights to start from: a file, a saved model or a run's workdir"),
    "init.pretrained": Key(False, bool, "start from the released weights of model.name"),
    "init.reset_head": Key(False, bool, "initialise the head anew, as other classes need"),
    "init.fit_head": Key(False, bool, "fit the head on features of the training split, a folder, before step 1"),
    "init.ema": Key(False, bool, "take the EMA of the run in init.weights"),
    "data.name": Key("imagenet2012", NAME, "digits, a folder, synthetic, or a TFDS data set as array_record"),
    "data.data_dir": Key(None, NAME, "of TFDS; None: its own default"),
    "data.train_split": Key("train", NAME, "a split or a part of one, such as train[:90%]"),
    "data.eval_split": Key("validation", NAME, "split for evaluation"),
    "data.mean": Key((0.485, 0.456, 0.406), CHANNELS, "of each channel, on a scale from 0 to 1"),
    "data.std": Key((0.229, 0.224, 0.225), POSITIVE_CHANNELS, "of each channel"),
    "data.aug_repeats": Key(3, COUNT, "repeated augmentation: how often an image comes in a row"),
    "data.balanced": Key(False, bool, "sample every class equally often"),
    "data.resize": Key("exact", Words(RESIZES), "exact: Pillow's bicubic, as published; fast: OpenCV's"),
    "data.workers": Key(0, Number(0, 1024, whole=True), "processes that decode images; 0: threads of this one"),
    "augment.scale": Key((0.08, 1.0), CROP_SCALE, "random resized crop: share of the image's area"),
    "augment.ratio": Key((0.75, 4 / 3), CROP_RATIO, "random resized crop: width over height"),
    "augment.simple_crop": Key(False, bool, "DeiT III's simple random crop instead"),
    "augment.hflip": Key(True, bool, "mirror with probability 1/2"),
    "augment.pad_crop": Key(0, Number(0, 2**14, whole=True), "pixels of padding before a crop of the same size"),
    "augment.rotate": Key(0.0, Number(0, 180), "largest rotation in degrees"),
    "augment.zoom": Key(0.0, BELOW_1, "largest relative change of size"),
    "augment.shear": Key(0.0, RATE, "largest horizontal shear"),
    "augment.translate": Key(0.0, SHARE, "largest shift, as a share of the side"),
    "augment.rand_augment": Key("rand-m9-mstd0.5-inc1", str, "RandAugment as timm writes it; empty: none"),
    "augment.three_augment": Key(False, bool, "DeiT III's: grayscale, solarisation or blur"),
    "augment.color_jitter": Key(0.0, RATE, "brightness, contrast and saturation change by up to this"),
    "augment.reprob": Key(0.25, SHARE, "probability of random erasing"),
    "augment.mixup": Key(0.8, ALPHA, "alpha of mixup; 0: none"),
    "augment.cutmix": Key(1.0, ALPHA, "alpha of CutMix; 0: none"),
    "augment.mixup_prob": Key(1.0, SHARE, "probability of mixing a group of rows at all"),
    "augment.mixup_switch_prob": Key(0.5, SHARE, "probability of CutMix where there are both"),
    "augment.mix_rows": Key(0, FROM_0, "rows that share a draw, even; 0: the whole batch"),
    "loss.name": Key("softmax", Words(("softmax", "binary")), "binary: each class is a yes or no of its own"),
    "loss.smoothing": Key(0.1, BELOW_1, "label smoothing"),
    "loss.target_threshold": Key(None, BELOW_1, "of binary: targets above it count as 1"),
    "distill.kind": Key("none", Words(("none", "hard", "soft")), "learn from a teacher; hard is the paper's"),
    "distill.teacher": Key("regnety_160", NAME, "a released name, a saved model or a run's workdir"),
    "distill.weights": Key(None, NAME, "a file for a named teacher, instead of its release"),
    "distill.logits": Key(None, NAME, "a file of recorded logits instead of a teacher"),
    "distill.alpha": Key(0.5, SHARE, "the teacher's share of the loss"),
    "distill.temperature": Key(1.0, SCALE, "of soft distillation"),
    # of objective=mae
    "mae.mask_ratio": Key(0.75, Number(0, 1, above=True, below=True), "share of the patches that is masked"),
    "mae.decoder_depth": Key(8, BLOCKS, "blocks of the decoder"),
    "mae.decoder_width": Key(512, COUNT, "channels of a token in the decoder, a multiple of 4"),
    "mae.decoder_heads": Key(16, COUNT, "heads of the decoder"),
    "mae.norm_pixels": Key(True, bool, "predict each patch less its mean, over its standard deviation"),
    "mae.visible_weight": Key(0.0, RATE, "of the loss on visible patches, beside that on masked ones"),
    "mae.pictures_every_epochs": Key(0.0, Number(0, 1e9), "epochs between pictures of reconstructions; 0: none"),
    # of objective=dino
    "dino.global_scale": Key((0.4, 1.0), CROP_SCALE, "global crops: share of the image's area"),
    "dino.second_scale": Key(None, CROP_SCALE, "of the second global crop; None: as of the first"),
    "dino.local_crops": Key(8, Number(0, 64, whole=True), "local crops of an image, beside two global ones"),
    "dino.local_scale": Key((0.05, 0.4), CROP_SCALE, "local crops: share of the image's area"),
    "dino.local_size": Key(96, SIDE, "side of a local crop in pixels, a multiple of the patch's"),
    "dino.blur": Key(True, bool, "blur crops, as the paper does; images of 32 pixels are better off without"),
    "dino.head_hidden": Key(2048, COUNT, "width of the projection head's two hidden layers"),
    "dino.bottleneck": Key(256, COUNT, "width before its last layer"),
    "dino.out_dim": Key(65536, Number(2, INT32, whole=True), "outputs of its last layer"),
    "dino.freeze_last_epochs": Key(1.0, Number(0, 1e6), "in which the last layer is not trained"),
    "dino.student_temp": Key(0.1, SCALE, "temperature of the student's softmax"),
    "dino.teacher_temp_start": Key(0.04, SCALE, "temperature of the teacher's softmax in step 0"),
    "dino.teacher_temp": Key(0.07, SCALE, "temperature of the teacher's softmax after the warm-up"),
    "dino.teacher_temp_epochs": Key(30.0, Number(0, 1e6), "length of that linear warm-up"),
    "dino.teacher_momentum": Key(0.996, SHARE, "of the teacher in step 0, by a cosine to 1 at the end"),
    "dino.center_momentum": Key(0.9, SHARE, "of the moving mean of the teacher's outputs"),
    "dino.koleo": Key(0.0, RATE, "weight of KoLeo, which spreads the features of a batch; 0: none"),
    # adapters learn instead of the matrices of the blocks (LoRA)
    "lora.rank": Key(0, BLOCKS_FROM_0, "of the adapters, which learn with the head alone; 0: none"),
    "lora.alpha": Key(16.0, SCALE, "their products are scaled by alpha over rank"),
    "optimizer.name": Key("adamw", Words(OPTIMIZERS), "the others take the keys below where they apply"),
    "optimizer.learning_rate": Key(5e-4, RATE, "peak, for a batch of reference_batch images"),
    "optimizer.reference_batch": Key(512, FROM_0, "the peak is scaled by batch_size over this; 0: not scaled"),
    "optimizer.warmup_epochs": Key(5.0, Number(0, 1e6), "linear warm-up, a part of the run's length"),
    "optimizer.warmup_learning_rate": Key(1e-6, RATE, "learning rate of step 0"),
    "optimizer.schedule": Key("cosine", Words(SCHEDULES), "after the warm-up"),
    "optimizer.final_learning_rate": Key(1e-5, RATE, "where the cosine ends"),
    "optimizer.decay_epochs": Key(None, EPOCHS, "of step: epochs between drops; None: 30"),
    "optimizer.decay_rate": Key(None, PART, "of step: factor of a drop; None: 0.1"),
    "optimizer.per_epoch": Key(False, bool, "one rate an epoch, as in DeiT's published code"),
    "optimizer.weight_decay": Key(0.05, RATE, "of kernels only, times the learning rate"),
    "optimizer.final_weight_decay": Key(None, RATE, "where a cosine of it ends; None: it is constant"),
    "optimizer.b1": Key(0.9, BELOW_1, "decay of the first moment"),
    "optimizer.b2": Key(0.999, BELOW_1, "decay of the second moment; lion wants 0.99"),
    "optimizer.eps": Key(None, Number(0, 1, above=True), "None: 1e-8, for lamb 1e-6"),
    "optimizer.momentum": Key(0.9, BELOW_1, "of sgd"),
    "optimizer.nesterov": Key(False, bool, "of sgd"),
    "optimizer.layer_decay": Key(1.0, PART, "learning rate of a layer over that of the next"),
    "optimizer.train": Key("all", TRAINED, "what is trained; a number: so many last blocks"),
    "optimizer.sam_rho": Key(0.0, RATE, "radius of sharpness-aware minimisation; 0: none"),
    "optimizer.grad_clip_norm": Key(None, NORM, "global norm; 0: none; None: 1 for lamb, else none"),
    "optimizer.grad_accum": Key(1, COUNT, "micro batches a step, their gradients averaged"),
    "optimizer.ema_decay": Key(0.99996, BELOW_1, "of the parameters' EMA; 0: none is kept"),
    # first the head alone, then the last blocks too
    "phases.head_epochs": Key(0.0, Number(0, 1e6), "0: no phases; else these keys are rate, schedule and length"),
    "phases.head_learning_rate": Key(1e-3, RATE, "constant in the first phase"),
    "phases.blocks": Key(4, FROM_0, "last blocks that are trained in the second phase"),
    "phases.blocks_epochs": Key(15.0, EPOCHS, "length of the second phase"),
    "phases.blocks_learning_rate": Key(1e-5, RATE, "constant in the second phase"),
    # the devices, whose number is the product
    "mesh.data": Key(-1, DEVICES, "devices with other images and the same parameters; -1: the rest"),
    "mesh.fsdp": Key(1, DEVICES, "devices with other images and a part of the parameters each"),
    "mesh.tensor": Key(1, DEVICES, "devices that share images and split the layers, within a process"),
    "eval.batch_size": Key(1024, COUNT, "images a step of evaluation, which the result does not depend on"),
    "eval.every_epochs": Key(1.0, Number(0, 1e9, above=True), "epochs between evaluations; the last step has one"),
    "eval.crop_pct": Key(1.0, PART, "side of the centre crop over the resized short side"),
    "checkpoint.every_steps": Key(1000, COUNT, "steps between checkpoints, beside those of evaluations"),
    "checkpoint.keep": Key(2, COUNT, "newest checkpoints kept, beside the best by accuracy or k-NN accuracy"),
    "checkpoint.retry_seconds": Key(60.0, Number(0, 1e6), "in which the last save is tried again"),
    "nonfinite.skips": Key(10, FROM_0, "steps in a row that may be skipped, whose loss or gradient is not finite"),
    "nonfinite.rollbacks": Key(3, FROM_0, "rollbacks to a checkpoint, after more of them, before the run stops"),
    # of several processes, which all end when one hangs
    "watchdog.seconds": Key(45.0, WAIT, "for one to answer, and for its data or a step"),
    "watchdog.factor": Key(20.0, Number(1, 1e6), "times the slowest of late instead, where that is longer"),
    "watchdog.start_seconds": Key(600.0, WAIT, "for one to start, and for the first step, save and evaluation"),
    "report.every_steps": Key(50, COUNT, "steps between lines of the log and of metrics.jsonl"),
    "report.inspect_every": Key(0, FROM_0, "steps between records of LayerScale and branch norms; 0: none"),
    "report.predictions": Key(0, Number(0, 256, whole=True), "evaluation images drawn with predictions; 0: none"),
    "report.tensorboard": Key(False, bool, "write TensorBoard files to WORKDIR/tensorboard too"),
    "report.wandb": Key(False, bool, "send metrics to Weights & Biases"),
    "report.mlflow": Key(False, bool, "send metrics to MLflow"),
    "report.trackio": Key(False, bool, "send metrics to trackio"),
    "report.project": Key("cait_jax", NAME, "at these three"),
}
# fmt: on


def key_rows(values: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """A row for each key: name, default or, of a config, value; what is allowed, and meaning."""
    defaults = {name: key.default for name, key in KEYS.items()}
    return [
        {
            "key": name,
            "default" if values is None else "value": str((values or defaults)[name]) or "(empty)",
            "allowed": wanted(key.kind) + ", or None" * (key.default is None),
            "meaning": key.meaning,
        }
        for name, key in KEYS.items()
    ]


def misfit(name: str, value: Any) -> UserError:
    """The error of a value that its key cannot have."""
    key = KEYS[name]
    shown = _shown(value)
    none = ", or None" if key.default is None else ""
    return UserError(
        f"{setting(f'config.{name}')} is {shown} and must be {wanted(key.kind)}{none}{_hint(key.kind, value)}"
    )


def _shown(value: Any) -> str:
    """A value in a sentence, shortened."""
    try:
        text = repr(value) if isinstance(value, str) and not value.strip() else str(value)
    except ValueError:  # of more digits than Python converts
        text = "an integer of thousands of digits"
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def wanted(kind: Kind) -> str:
    """What a value must be: the end of a sentence, such as `"a whole number from 1 to 1,024"`."""
    match kind:
        case Number():
            also = "" if kind.also is None else f", or {kind.also}"
            return f"a {'whole' if kind.whole else 'finite'} number{_range(kind)}{also}"
        case Several():
            count = " or ".join(map(str, kind.counts)) + " increasing" * kind.increasing
            within = wanted(kind.each).removeprefix("a finite number")
            return f"{count} finite numbers{within}, such as {kind.example}"
        case Size():
            return f"{wanted(kind.side)}, or height and width, such as {kind.both.example}"
        case Words():
            if len(kind.known) > _FEW:
                return "a known name"
            count = f", or {wanted(kind.count)}" if kind.count else ""
            return f"one of {', '.join(kind.known)}{count}"
        case Name():
            return "text that is not empty"
    return "True or False" if kind is bool else "text"


def _range(of: Number) -> str:
    if of.low == -math.inf:
        return ""
    low, high = (f"{int(x):,}" if x % 1 == 0 else f"{x:g}" for x in (of.low, of.high))
    if of.high == math.inf or (of.whole and of.high == INT32):
        return f" above {low}" if of.above else f" of {low} or more"
    if of.whole:
        return f" from {low} to {high}"
    if of.high >= 1000:  # a comma among digits is none between ends
        return f"{' above' if of.above else ' of at least'} {low} and at most {high}"
    return f" in {'(' if of.above else '['}{low}, {high}{')' if of.below else ']'}"


def _hint(kind: Kind, value: Any) -> str:
    """What is near a wrong value."""
    if isinstance(kind, Words):
        few = len(kind.known) <= _FEW
        near = nearest(str(value), kind.known, count=1 if few else 3)
        return "" if few and not near.startswith("nearest") else f"; {near}"
    if isinstance(kind, Number) and kind.whole and kind.high == INT32:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return f" and at most {INT32:,}" * (int(value) > INT32)
    return ""
