"""What is exported: a network as one pure function of variables and images, in plain operations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cait_jax.augment.pipeline import normalise
from cait_jax.data.preprocess import Preprocessing
from cait_jax.explain.attention import check_class_token, class_rows, over_image, patch_grid
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import forward_intermediates
from cait_jax.weights.timm_names import from_timm, to_timm


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network and what its function takes and gives.

    Attributes:
      model: with plain attention (`"xla"`) in place of the kernels of a platform.
      variables: of `model`.
      preprocessing: of its images; None if it is not known.
      uint8: whether images are uint8 crops, which the function normalises, instead of normalised float32.
      attention: whether the function gives a second output.
    """

    model: Any
    variables: Mapping[str, Any]
    preprocessing: Preprocessing | None
    uint8: bool = False
    attention: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return *self.model.image_size, self.model.in_channels

    @property
    def output_names(self) -> tuple[str, ...]:
        """`logits`, or of a network without a head `features`; and `attention`."""
        first = "logits" if self.model.num_classes else "features"
        return (first, "attention") if self.attention else (first,)

    @property
    def function(self) -> Callable[[Any, Any], tuple[Any, ...]]:
        """From variables and images (batch, height, width, channels) to a tuple of outputs.

        `logits` are (batch, classes). `attention` (batch, rows, columns) is what the class token reads from each
        patch in the last layer that has it, as a mean over heads.
        """

        def forward(variables: Any, images: Any) -> tuple[Any, ...]:
            if self.uint8 and self.preprocessing is not None:
                images = normalise(images, self.preprocessing.mean, self.preprocessing.std)
            if not self.attention:
                return (self.model.apply(variables, images),)
            logits, inside = forward_intermediates(self.model, variables, images)
            rows, columns = patch_grid(self.model)
            last = class_rows(self.model, inside)[-1].mean(axis=1)
            return logits, over_image(self.model, last[:, -rows * columns :])

        return forward


def to_export(
    model: Any,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing | None,
    *,
    uint8: bool,
    attention: bool,
    stacked: bool,
) -> Exported:
    """The network in the form that is exported.

    Args:
      model: of this package.
      variables: of the model.
      preprocessing: of its images; with `uint8` it is needed.
      uint8: see `Exported`.
      attention: see `Exported`; blocks are then unrolled, so that the maps of all layers are never held together.
      stacked: whether blocks may stay stacked.

    Raises:
      UserError: attention is asked of a network without a class token.
    """
    if attention:
        check_class_token(model, way="leave out the attention")
    if isinstance(model, CaiT):
        plain = model.clone(
            attention="xla", remat="none", stacked=model.stacked and stacked and not attention
        )
        if plain.stacked != model.stacked:
            variables = from_timm(to_timm(variables), plain)
        model = plain
    return Exported(model, variables, preprocessing, uint8, attention)
