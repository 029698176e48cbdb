"""Masked autoencoding: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

Most patches of an image are masked. The encoder, which is the self-attention stage of CaiT or ViT, sees the others
alone; a light decoder gets their tokens and a learned one for each masked patch, and predicts the pixels.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from cait_jax.augment import pipeline
from cait_jax.augment.pipeline import Augmentation
from cait_jax.data.split import Split
from cait_jax.errors import UserError, setting
from cait_jax.evaluation.features import collect_features, jit_features
from cait_jax.models.cait import CaiT
from cait_jax.models.layers import LINEAR_INIT, DtypePolicy, LayerNorm, linear, take_tokens
from cait_jax.models.residual import residual_scheme
from cait_jax.models.variants import VARIANTS
from cait_jax.models.vit import VisionTransformer
from cait_jax.models.zoo import create_model
from cait_jax.sharding import batch_sharding, constrain_batch, positions, replicated, tile
from cait_jax.train.objectives import knn
from cait_jax.train.objectives.patches import (
    Images,
    Order,
    Patches,
    normalise_patches,
    patchify,
    ranks,
    shuffle,
    sin_cos,
)
from cait_jax.train.step import Aux, Batch, Evaluate, Keys, Params, Record, training_options

_EVALUATION = 2**32 - 1  # no step has this number


class Decoder(VisionTransformer):
    """Pixels of all patches from the tokens of the visible ones: a ViT without class token (section 3, decoder).

    `image_size`, `patch_size` and `in_channels` are those of what it draws; positions are fixed, `sin_cos`. Linear
    layers start as the encoder's do, from N(0, 0.02^2) and 0, where the paper has Glorot and Bengio's rule.
    """

    class_token: str | int = "mean"

    @nn.compact
    def __call__(  # type: ignore[override]
        self, tokens: Float[Array, "batch kept d"], rank: Order
    ) -> Patches:
        """Pixels in at least float32; `rank` says where in `shuffle`'s order each patch is, visible ones first."""
        dtypes = DtypePolicy(self.dtype, self.param_dtype, self.precision)
        wide = DtypePolicy(dtypes.accum_dtype, self.param_dtype, self.precision)
        (height, width), side = self.image_size, self.patch_size

        x = LayerNorm(name="encoder_norm", **dtypes.norm)(tokens)
        x = linear(x, self.width, "embed", dtypes)
        mask_token = self.param("mask_token", LINEAR_INIT, (1, 1, self.width), self.param_dtype)
        masked = rank.shape[1] - x.shape[1]
        mask_tokens = jnp.repeat(tile(mask_token.astype(self.dtype), x), masked, axis=1)
        x = take_tokens(jnp.concatenate([x, mask_tokens], axis=1), rank)
        grid = sin_cos(height // side, width // side, self.width)
        x = x + jnp.asarray(grid, self.dtype)[None]
        with residual_scheme(self):
            x = self._self_attention_stage(x, None, dtypes)
        x = LayerNorm(name="norm", **dtypes.norm)(x)
        return linear(x, side**2 * self.in_channels, "pixels", wide)


@struct.dataclass
class Mae:
    """The objective. A batch has `image` uint8 (batch, h, w, channels); labels are not read.

    Parameters are `{"encoder": ..., "decoder": ...}`; the encoder's are those of `model` but for class attention,
    last norm and head.

    Attributes:
      model: applied as `model.apply(variables, images, train=True, example_ids=..., rngs=..., visible=...)`.
      decoder: from the tokens of visible patches to the pixels of all.
      masked: patches of an image that are masked.
      mean: of each channel, as `std` on a scale from 0 to 1.
      augmentation: what is drawn for each image.
      norm_pixels: whether each patch is predicted less its mean, over its standard deviation (section 4.1).
      visible_weight: of the loss on visible patches; that on masked ones has 1.
      seed: masks of evaluation follow from it.
      pictures_every_epochs: between pictures of reconstructions; 0: none.
      bank: the images whose features are neighbours; None: k-NN accuracy is not measured.
    """

    model: Any = struct.field(pytree_node=False)
    decoder: Decoder = struct.field(pytree_node=False)
    masked: int = struct.field(pytree_node=False)
    mean: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    std: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    augmentation: Augmentation = struct.field(pytree_node=False, default=Augmentation())
    norm_pixels: bool = struct.field(pytree_node=False, default=True)
    visible_weight: float = struct.field(pytree_node=False, default=0.0)
    seed: int = struct.field(pytree_node=False, default=0)
    pictures_every_epochs: float = struct.field(pytree_node=False, default=0.0)
    bank: knn.Bank | None = struct.field(pytree_node=False, default=None)

    rngs: ClassVar[tuple[str, ...]] = ("augment", "mask", "dropout", "drop_path")

    @property
    def patches(self) -> int:
        """Of an image."""
        return math.prod(side // self.model.patch_size for side in self.model.image_size)

    @property
    def kept(self) -> int:
        """Patches of an image that are visible."""
        return self.patches - self.masked

    def init(self, key: Array, images: Array, params: Params = None) -> tuple[Params, Any]:
        """Parameters, unless they are given; an encoder from a seed is the classifier's from that seed."""
        if params is not None:
            return params, {}
        order = jnp.zeros((1, self.patches), jnp.int32)
        tokens = jnp.zeros((1, self.kept, self.model.width), self.model.dtype)
        encoder = self.model.init(key, images, visible=order[:, : self.kept])
        decoder: Any = self.decoder.init(jax.random.fold_in(key, 1), tokens, order)
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, {}

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Augments and normalises images, and draws which of their patches are visible."""
        ids = positions(batch["image"])
        images = batch["image"].astype(jnp.float32)
        images = pipeline.augment(keys["augment"], images, ids, self.augmentation)
        images = pipeline.normalise(images, self.mean, self.std)
        return {"image": images, "order": shuffle(keys["mask"], ids, self.patches), "id": ids}

    def loss(
        self, params: Params, carried: Any, batch: Batch, keys: Keys, step: Array
    ) -> tuple[Array, Aux]:
        """The mean squared error of pixels, `masked_mse`, plus `visible_weight` times that of visible patches."""
        del carried, step
        options = training_options(keys, batch["id"])
        predicted = self.predict(params, batch["image"], batch["order"], **options)
        masked, visible = self.errors(predicted, batch["image"], batch["order"])
        loss = (masked + self.visible_weight * visible).mean()
        return loss, {"metrics": {"masked_mse": masked.mean(), "visible_mse": visible.mean()}}

    def predict(self, params: Params, images: Images, order: Order, **options: Any) -> Patches:
        """The pixels of all patches, as `target` has them; `options` are those of `model.apply`."""
        visible = order[:, : self.kept]
        tokens = self.model.apply({"params": params["encoder"]}, images, visible=visible, **options)
        pixels: Any = self.decoder.apply({"params": params["decoder"]}, tokens, ranks(order))
        return jnp.asarray(pixels)

    def target(self, images: Images) -> Patches:
        """What is predicted of normalised images, in at least float32."""
        wide = jnp.promote_types(self.model.dtype, jnp.float32)
        pixels = patchify(images.astype(wide), self.model.patch_size)
        return normalise_patches(pixels) if self.norm_pixels else pixels

    def errors(
        self, predicted: Patches, images: Images, order: Order
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """The mean squared error of each image's masked patches, and of its visible ones."""
        of_patch = jnp.square(predicted - self.target(images)).mean(axis=-1)
        masked = ranks(order) >= self.kept
        of_masked = jnp.where(masked, of_patch, 0).sum(axis=-1) / self.masked
        return of_masked, jnp.where(masked, 0, of_patch).sum(axis=-1) / self.kept

    def update(self, carried: Any, params: Params, aux: Aux, step: Array) -> Any:
        """Nothing is carried."""
        del params, aux, step
        return carried

    def evaluation_order(self, first: Array, images: Array) -> Order:
        """The order of the patches of `images`, the first of which has the number `first` in its split."""
        key = jax.random.fold_in(jax.random.key(self.seed), _EVALUATION)
        return shuffle(key, first + positions(images), self.patches)

    def features(self, params: Params, images: Images) -> Float[Array, "batch d"]:
        """The mean token of all patches, normalised as for the decoder."""
        patches = tile(jnp.arange(self.patches)[None], images)
        tokens = self.model.apply({"params": params["encoder"]}, images, visible=patches)
        dtypes = DtypePolicy(self.model.dtype, self.model.param_dtype, self.model.precision)
        norm: Any = LayerNorm(**dtypes.norm)
        found: Any = norm.apply({"params": params["decoder"]["encoder_norm"]}, tokens)
        return jnp.asarray(found.mean(axis=1))

    def evaluator(self, mesh: Mesh) -> Evaluate:
        """`loss` on the evaluation split, with masks that follow from the seed and an example's number in it.

        With a `bank` also the `knn.feature_metrics` of `features`.
        """

        def measure(variables: tuple[Mapping[str, Params], Array], batch: Batch) -> Any:
            named, first = variables
            images = pipeline.normalise(batch["image"], self.mean, self.std)
            order = self.evaluation_order(first, images)
            found: dict[str, dict[str, Array]] = {}
            for name, params in named.items():
                masked, visible = self.errors(self.predict(params, images, order), images, order)
                found[name] = {"loss": masked + self.visible_weight * visible}
                if self.bank is not None:
                    found[name]["features"] = self.features(params, images)
            return {"features": found, "label": batch["label"], "mask": batch["mask"]}

        step = jax.jit(
            constrain_batch(measure, mesh),
            in_shardings=(None, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

        def features(named: Mapping[str, Params], images: Images) -> dict[str, Array]:
            return {name: self.features(params, images) for name, params in named.items()}

        of_bank = jit_features(features, self.mean, self.std, mesh)

        def run(params: Any, batches: Any, progress: Any = None) -> dict[str, dict[str, float]]:
            rows = 0

            def numbered(params: Any, batch: Mapping[str, Any]) -> Any:
                nonlocal rows
                first, rows = rows, rows + len(batch["image"])
                return step((params, np.int32(first)), batch)

            found, labels = collect_features(numbered, params, batches, mesh, progress)
            metrics = {
                name: {"loss": float(each["loss"].mean(dtype=np.float64))}
                for name, each in found.items()
            }
            if self.bank is not None:
                alive = getattr(batches, "before_each", lambda: None)
                known, known_labels = self.bank.collect(of_bank, params, mesh, alive)
                for name, each in found.items():
                    metrics[name] |= knn.feature_metrics(
                        each["features"].astype(np.float32), labels, known[name], known_labels
                    )
            return metrics

        return run

    def recorder(self, trainer: Any, workdir: Path) -> tuple[int, Record] | None:
        """Pictures of reconstructions, see `reconstructions.picture_recorder`."""
        if not self.pictures_every_epochs:
            return None
        from cait_jax.train.objectives.reconstructions import picture_recorder

        steps_per_epoch = len(trainer.train_split) / trainer.config.batch_size
        every = max(1, round(self.pictures_every_epochs * steps_per_epoch))
        return every, picture_recorder(self, trainer, workdir)


def from_config(config: ConfigDict, split: Split) -> Mae:
    """The objective of a config for a training split.

    Raises:
      UserError: for a network without patches, or a decoder or mask that does not fit.
    """
    name = config.model.name
    if name in VARIANTS and VARIANTS[name].family == "RegNetY":
        raise UserError(
            f"{setting('config.objective', 'mae')} masks patches, and {name} has none: choose a transformer, such "
            "as cait_xxs24 or vit_small"
        )
    model: Any = create_model(
        image_size=config.image_size, num_classes=0, in_channels=split.channels, **config.model
    )
    settings = config.mae
    patches = math.prod(side // model.patch_size for side in model.image_size)
    masked = round(settings.mask_ratio * patches)
    if not 0 < masked < patches:
        raise UserError(
            f"{setting('config.mae.mask_ratio', settings.mask_ratio)} masks {masked} of an image's {patches} "
            "patches, and some must be masked and some visible: choose another, or a smaller "
            f"{setting('config.model.patch_size')}"
        )
    return Mae(
        model=model,
        decoder=decoder_from_config(config, model),
        masked=masked,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augmentation=pipeline.from_config(config),
        norm_pixels=settings.norm_pixels,
        visible_weight=settings.visible_weight,
        seed=config.seed,
        pictures_every_epochs=settings.pictures_every_epochs,
        bank=knn.bank_from_config(config, split, model),
    )


def decoder_from_config(config: ConfigDict, model: CaiT) -> Decoder:
    """The decoder of `mae.*` for an encoder, with its dtypes, rematerialisation and stacking."""
    settings = config.mae
    width, heads = settings.decoder_width, settings.decoder_heads
    if width % 4 or width % heads:
        raise UserError(
            f"{setting('config.mae.decoder_width', width)} must be a multiple of 4, for its positions, and of "
            f"{setting('config.mae.decoder_heads', heads)}"
        )
    alike = (
        "image_size", "patch_size", "in_channels", "dtype", "param_dtype", "precision", "remat", "stacked",
    )  # fmt: skip
    return Decoder(
        width=width,
        depth=settings.decoder_depth,
        num_heads=heads,
        num_classes=0,
        **{name: getattr(model, name) for name in alike},
    )
