"""RegNetY (Radosavovic et al., arXiv 2003.13678): the convolutional network that taught the paper's models."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import DtypePolicy, Images, record

Maps = Float[Array, "batch height width channels"]


def stage_sizes(
    w0: int, wa: float, wm: float, depth: int, group_width: int
) -> tuple[tuple[int, int], ...]:
    """Widths and depths of the stages from the design's parameters (equations 2 to 4).

    Block j would like `u_j = w0 + wa * j` channels. That is rounded in the exponent to `w0 * wm**s_j`, then to a
    multiple of 8 and, for each run of equal widths, which is a stage, to a multiple of `group_width`.

    Args:
      w0: width of the first block.
      wa: growth of the width by block.
      wm: factor between stages.
      depth: blocks in all.
      group_width: channels of a group of the 3x3 convolutions.

    Returns:
      (channels, blocks) of each stage.
    """
    wished = w0 + wa * np.arange(depth)
    steps = np.round(np.log(wished / w0) / np.log(wm))
    quantised = 8 * np.round(w0 * wm**steps / 8).astype(int)
    widths, depths = np.unique(quantised, return_counts=True)
    fitted = [group_width * round(w / min(group_width, w)) for w in widths.tolist()]
    return tuple(zip(fitted, depths.tolist(), strict=True))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and, if asked for, ReLU."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    relu: bool = True
    zero_scale: bool = False
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch out_h out_w features"]:
        """Pads by half the kernel on every side."""
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
        """Gates `x`."""

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
    """The Y block: 1x1, grouped 3x3, squeeze and excitation, 1x1, beside a shortcut."""

    features: int
    stride: int
    group_width: int
    se_ratio: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Float[Array, "batch out_h out_w features"]:
        """Adds the branch to the shortcut, which is a 1x1 convolution where sizes change."""
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
        """Applies the blocks `b1`, `b2`, ..."""
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
        """Logits of the pooled features."""
        init = nn.initializers.normal(0.01)
        fc = nn.Dense(self.num_classes, kernel_init=init, name="fc", **self.dtypes.dense)
        return fc(features)


class RegNetY(nn.Module):
    """The network, in evaluation and, with mutable `batch_stats`, in training.

    Attributes:
      image_size: (height, width) the model is meant for; others work as well.
      w0: width of the first block before rounding.
      wa: growth of the width by block.
      wm: factor between the widths of stages.
      depth: blocks in all.
      group_width: channels of a group of the 3x3 convolutions.
      se_ratio: hidden width of squeeze and excitation over a block's input width.
      stem_width: channels of the first convolution.
      num_classes: classes of the head; 0 for no head, which gives the pooled features.
      in_channels: channels of the image.
      dtype: of the computation; logits are at least float32.
      param_dtype: of the parameters.
      precision: of products; `"highest"` for exact runs.
    """

    image_size: tuple[int, int]
    w0: int
    wa: float
    wm: float
    depth: int
    group_width: int
    se_ratio: float = 0.25
    stem_width: int = 32
    num_classes: int = 1000
    in_channels: int = 3
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(
        self, images: Images, train: bool = False, example_ids: Any = None
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          images: normalised float images, (batch, height, width, in_channels).
          train: normalise by the batch and update `batch_stats`, instead of using them.
          example_ids: unused, for nothing is drawn; there so that all networks are called alike.

        Returns:
          Logits (batch, num_classes), or features (batch, channels) if `num_classes` is 0.

        Raises:
          ValueError: if the images do not have `in_channels`.
        """
        if images.shape[-1] != self.in_channels:
            raise ValueError(
                f"images of {images.shape[-1]} channels do not fit a model for {self.in_channels}"
            )
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
