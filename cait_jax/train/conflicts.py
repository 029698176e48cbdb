"""Settings of a config that exclude each other, or of which one would have no effect."""

from collections.abc import Callable, Mapping
from typing import Any

from cait_jax.train.keys import KEYS

# From a flat config to whether a sentence is due, and the sentence: what to do about it.
# fmt: off
CONFLICTS: tuple[tuple[Callable[[Mapping[str, Any]], Any], str], ...] = (
    (lambda of: of["augment.three_augment"] and of["augment.rand_augment"],
     "--config.augment.three_augment replaces RandAugment, which is on: set "
     "--config.augment.rand_augment= (empty), or leave three_augment out"),
    (lambda of: of["augment.color_jitter"] and of["augment.rand_augment"],
     "--config.augment.color_jitter has no place beside RandAugment, which changes colours itself: set "
     "--config.augment.rand_augment= (empty), or --config.augment.color_jitter=0"),
    (lambda of: of["augment.mix_rows"] % 2,
     "--config.augment.mix_rows must be even, or 0 for the whole batch: in an odd group one image would be mixed "
     "with itself"),
    (lambda of: of["distill.kind"] == "none" and of["distill.weights"] is not None,
     "--config.distill.weights is given and nothing learns from it: set --config.distill.kind to hard or soft"),
    (lambda of: of["distill.logits"] is not None and of["distill.weights"] is not None,
     "--config.distill.weights and --config.distill.logits both say what the teacher is: give one"),
    (lambda of: of["optimizer.schedule"] != "step"
     and (of["optimizer.decay_epochs"] is not None or of["optimizer.decay_rate"] is not None),
     "--config.optimizer.decay_epochs and --config.optimizer.decay_rate are for --config.optimizer.schedule=step: "
     "set that, or leave them out"),
    (lambda of: of["phases.head_epochs"] and of["optimizer.train"] != "all",
     "--config.phases.head_epochs and --config.optimizer.train both say what learns: set "
     "--config.optimizer.train=all, or --config.phases.head_epochs=0"),
    (lambda of: of["phases.head_epochs"] and of["optimizer.layer_decay"] != 1,
     "--config.optimizer.layer_decay has no effect on phases, whose rates are constant: set it to 1, or "
     "--config.phases.head_epochs=0"),
    (lambda of: of["phases.head_epochs"] and of["optimizer.final_weight_decay"] is not None,
     "--config.optimizer.final_weight_decay has no effect on phases, whose weight decay is constant: set it to "
     "None, or --config.phases.head_epochs=0"),
    (lambda of: of["init.fit_head"] and of["objective"] != "supervised",
     "--config.init.fit_head is for --config.objective=supervised: set that, or --config.init.fit_head=False"),
    (lambda of: of["init.fit_head"] and of["init.weights"] is None and not of["init.pretrained"],
     "--config.init.fit_head computes features by weights that are learnt: give --config.init.weights=PATH or "
     "--config.init.pretrained=True, or set --config.init.fit_head=False"),
    (lambda of: of["lora.rank"] and of["objective"] != "supervised",
     "--config.lora.rank is for --config.objective=supervised: set that, or --config.lora.rank=0"),
    (lambda of: of["lora.rank"] and of["init.weights"] is None and not of["init.pretrained"],
     "--config.lora.rank adapts weights that are learnt: give --config.init.weights=PATH or "
     "--config.init.pretrained=True, or set --config.lora.rank=0"),
    (lambda of: of["lora.rank"] and of["optimizer.name"] == "muon",
     "--config.optimizer.name=muon is for the matrices of the blocks, which --config.lora.rank freezes: choose "
     "another optimizer, or set --config.lora.rank=0"),
    (lambda of: of["lora.rank"] and of["report.inspect_every"],
     "--config.report.inspect_every records what --config.lora.rank freezes: set one of them to 0"),
    (lambda of: not of["lora.rank"] and of["lora.alpha"] != KEYS["lora.alpha"].default,
     "--config.lora.alpha is for adapters: set --config.lora.rank, such as 8, or leave it out"),
    (lambda of: of["model.layer_scale_init"] is not None
     and of["model.residual"] not in (None, "layerscale", "scalar"),
     "--config.model.layer_scale_init is for --config.model.residual=layerscale or scalar: leave it out"),
    (lambda of: of["optimizer.nesterov"] and not of["optimizer.momentum"],
     "--config.optimizer.nesterov needs momentum: set --config.optimizer.momentum, such as 0.9, or "
     "--config.optimizer.nesterov=False"),
    (lambda of: of["objective"] == "mae" and (of["augment.mixup"] or of["augment.cutmix"] or of["augment.reprob"]),
     "--config.objective=mae neither mixes images nor erases parts of them: set --config.augment.mixup=0, "
     "--config.augment.cutmix=0 and --config.augment.reprob=0"),
    (lambda of: of["objective"] == "mae" and of["distill.kind"] != "none",
     "--config.objective=mae has no teacher: set --config.distill.kind=none"),
    (lambda of: of["objective"] == "mae" and (of["init.weights"] is not None or of["init.pretrained"]),
     "--config.objective=mae starts from the seed alone: leave out --config.init.weights and "
     "--config.init.pretrained"),
    (lambda of: of["objective"] == "mae"
     and (of["optimizer.layer_decay"] != 1 or of["optimizer.train"] != "all" or of["phases.head_epochs"]),
     "--config.objective=mae trains all of its layers alike: set --config.optimizer.layer_decay=1, "
     "--config.optimizer.train=all and --config.phases.head_epochs=0"),
    (lambda of: of["objective"] != "supervised" and of["report.predictions"],
     "--config.report.predictions is for classifiers: set it to 0 with --config.objective=mae or dino"),
    (lambda of: of["objective"] == "mae" and of["report.inspect_every"],
     "--config.report.inspect_every is for classifiers: set it to 0 with --config.objective=mae"),
    (lambda of: of["objective"] != "mae"
     and any(of[name] != key.default for name, key in KEYS.items() if name.startswith("mae.")),
     "the keys --config.mae.* are for --config.objective=mae: set that, or leave them out"),
)
# fmt: on
