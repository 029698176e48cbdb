"""RegNetY (Radosavovic et al., arXiv 2003.13678), the teacher of the paper's distilled models."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import DtypePolicy, Images, check_images, record

Maps = Float[Array, "batch height width channels"]


def stage_sizes(
    w0: int, wa: float, wm: float, depth: int, group_width: int
) -> tuple[tuple[int, int], ...]:
    """Widths and depths of the stages from the design's parameters (equations 2 to 4).

    Block j has `u_j = w0 + wa * j` channels, rounded in the exponent to `w0 * wm**s_j`, then to a multiple of 8
    and, for each run of equal widths, which is a stage, to a multiple of `group_width`. Returns (channels, blocks)
    of each stage.
    """
    wished = w0 + wa * np.arange(depth)
    steps = np.round(np.log(wished / w0) / np.log(wm))
    quantised = 8 * np.round(w0 * wm**steps / 8).astype(int)
    widths, depths = np.unique(quantised, return_counts=True)
    fitted = [group_width * round(w / min(group_width, w)) for w in widths.tolist()]
    return tuple(zip(fitted, depths.tolist(), strict=True))


class ConvNorm(nn.Module):
    """Convolution without bias, padded by half the kernel on every side; batch norm; ReLU if `relu`."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    relu: bool = True
    zero_scale: bool = False
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch out_h out_w features"]:
        pad = self.kernel_size // 2
        fan_out = self.kernel_size**2 * self.features // self.groups
        x = nn.Conv(
            self.features,
            kernel_size=(self.kernel_size, self.kernel_size),
            strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            feature_group_count=self.groups,
            use_bias=False,
            **self.dtypes.dense,
            kernel_init=nn.initializers.normal((2.0 / fan_out) ** 0.5),
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            **self.dtypes.norm,
            scale_init=nn.initializers.zeros if self.zero_scale else nn.initializers.ones,
            name="bn",
        )(x)
        return nn.relu(x) if self.relu else x


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all (Hu et al., arXiv 1709.01507)."""

    hidden: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        def pointwise(features: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                kernel_size=(1, 1),
                **self.dtypes.dense,
                kernel_init=nn.initializers.normal((2.0 / features) ** 0.5),
                name=name,
            )

        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = nn.relu(pointwise(self.hidden, "fc1")(gate))
        return x * nn.sigmoid(pointwise(x.shape[-1], "fc2")(gate))


class Bottleneck(nn.Module):
    """The Y block: 1x1, grouped 3x3, squeeze and excitation, 1x1; the shortcut is 1x1 where sizes change."""

    features: int
    stride: int
    group_width: int
    se_ratio: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch out_h out_w features"]:
        groups = self.features // min(self.group_width, self.features)
        dtypes = self.dtypes

        branch = ConvNorm(self.features, 1, dtypes=dtypes, name="conv1")(x, train)
        branch = ConvNorm(self.features, 3, self.stride, groups, dtypes=dtypes, name="conv2")(
            branch, train
        )
        branch = SqueezeExcite(round(x.shape[-1] * self.se_ratio), dtypes, name="se")(branch)
        branch = ConvNorm(
            self.features, 1, relu=False, zero_scale=True, dtypes=dtypes, name="conv3"
        )(branch, train)

        if x.shape[-1] != self.features or self.stride != 1:
            x = ConvNorm(
                self.features, 1, self.stride, relu=False, dtypes=dtypes, name="downsample"
            )(x, train)
        return nn.relu(x + branch)


class Stage(nn.Module):
    """Blocks of one width; the first halves height and width."""

    features: int
    depth: int
    group_width: int
    se_ratio: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch out_h out_w features"]:
        for i in range(self.depth):
            x = Bottleneck(
                self.features,
                2 if i == 0 else 1,
                self.group_width,
                self.se_ratio,
                self.dtypes,
                name=f"b{i + 1}",
            )(x, train)
        record(self, "features", x)
        return x


class Classifier(nn.Module):
    """Linear layer on the mean over all positions."""

    num_classes: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch outputs"]:
        init = nn.initializers.normal(0.01)
        fc = nn.Dense(self.num_classes, kernel_init=init, name="fc", **self.dtypes.dense)
        return fc(features)


class RegNetY(nn.Module):
    """The network; training needs mutable `batch_stats`."""

    image_size: tuple[int, int]  # (height, width) the model is meant for; others work as well
    w0: int  # width of the first block before rounding
    wa: float  # growth of the width a block
    wm: float  # factor between the widths of stages
    depth: int  # number of blocks
    group_width: int  # channels of a group of the 3x3 convolutions
    se_ratio: float = 0.25  # hidden width of squeeze and excitation over a block's input width
    stem_width: int = 32  # channels of the first convolution
    num_classes: int = 1000  # 0: no head, which gives the pooled features
    in_channels: int = 3
    dtype: Any = jnp.float32  # of the computation; logits are at least float32
    param_dtype: Any = jnp.float32
    precision: Any = None  # of matmuls and convolutions; "highest" for exact runs

    @nn.compact
    def __call__(
        self, images: Images, train: bool = False, example_ids: Any = None
    ) -> Float[Array, "batch outputs"]:
        """Classifies normalised images; `train` updates `batch_stats` instead of using them.

        Nothing is drawn: `example_ids` is there so that all networks are called alike.
        """
        check_images(images, None, self.in_channels)
        dtypes = DtypePolicy(self.dtype, self.param_dtype, self.precision)
        x = ConvNorm(self.stem_width, 3, 2, dtypes=dtypes, name="stem")(
            jnp.asarray(images, self.dtype), train
        )
        sizes = stage_sizes(self.w0, self.wa, self.wm, self.depth, self.group_width)
        for i, (width, depth) in enumerate(sizes, start=1):
            x = Stage(width, depth, self.group_width, self.se_ratio, dtypes, name=f"s{i}")(x, train)
        features = x.mean(axis=(1, 2))
        record(self, "features", features)
        if self.num_classes == 0:
            return features.astype(dtypes.accum_dtype)
        head = DtypePolicy(dtypes.accum_dtype, self.param_dtype, self.precision)
        return Classifier(self.num_classes, head, name="head")(features)
