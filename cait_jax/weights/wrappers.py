"""What training scripts and compilers put around a state dict: containers, prefixes of names, counters."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cait_jax.errors import UserError, some

# Keys of a checkpoint under which the weights are, and their moving average.
_PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "student",
)
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", "teacher",
)  # fmt: skip
# Beginnings of names, none of which a network of this package has: of DistributedDataParallel, torch.compile,
# Lightning and other wrappers; of self-supervised pairs; of averages.
_PREFIXES = (
    "module.", "_orig_mod.", "model.", "network.", "net.", "backbone.", "encoder.", "student.", "online_model.",
    "state_dict.",
)  # fmt: skip
_AVERAGED_PREFIXES = ("ema.", "ema_model.", "model_ema.", "state_dict_ema.", "teacher.")
# What the names of our own networks begin with: files of a part of one have it before every name.
_OURS = (
    "blocks",
    "blocks_token_only",
    "patch_embed",
    "norm",
    "head",
    "head_dist",
    "stem",
    "s1",
    "s2",
    "s3",
    "s4",
)
# What averages count beside the weights.
_COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")


class Unwrapped(NamedTuple):
    """What was inside.

    Attributes:
      content: the state dict, or what it may be.
      averaged: it is a moving average.
      passed_over: the key or prefix of the other kind, where the file has both; empty if it has one.
    """

    content: Any
    averaged: bool
    passed_over: str


def unwrap(content: Any, *, ema: bool, is_weight: type) -> Unwrapped:
    """The state dict in a checkpoint. What stands beside it (optimiser, epoch, arguments) is left out.

    Args:
      content: what the file holds.
      ema: take the moving average, if both are there.
      is_weight: the type of a weight.
    """
    averaged, passed_over = False, ""
    for _ in range(3):  # wrappers in wrappers
        found = [key for key in (*_PLAIN, *_AVERAGED) if _holds(content, key, is_weight)]
        if not found:
            break
        of_kind = [key for key in found if (key in _AVERAGED) == ema]
        others = [key for key in found if (key in _AVERAGED) != ema]
        chosen = (of_kind or others)[0]
        passed_over = others[0] if of_kind and others else passed_over
        averaged = averaged or chosen in _AVERAGED
        content = content[chosen]
    return Unwrapped(content, averaged, passed_over)


def _holds(content: Any, key: str, is_weight: type) -> bool:
    inside = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(inside, Mapping):
        return False
    return any(
        isinstance(value, is_weight)
        or (name in (*_PLAIN, *_AVERAGED) and isinstance(value, Mapping))
        for name, value in inside.items()
    )


def strip(weights: Mapping[str, Any], *, ema: bool) -> Unwrapped:
    """Takes off what wrappers put before every name, one after the other, and leaves out counters of averages.

    A first part that all names share is a wrapper's too, whatever it is called.

    Args:
      weights: name to array.
      ema: where the names are of weights and of their average (`online_model.x`, `ema_model.x`), take the average.

    Raises:
      UserError: some names have a prefix and others none.
    """
    weights = {name: array for name, array in weights.items() if not _counts(name, array)}
    averaged, passed_over = False, ""
    while groups := _by_prefix(weights):
        prefixes = [prefix for prefix in groups if prefix]
        if not prefixes:
            common = {name.partition(".")[0] for name in weights}
            if (
                len(common) > 1
                or not common.isdisjoint(_OURS)
                or not all("." in n for n in weights)
            ):
                break
            weights = {name.partition(".")[2]: array for name, array in weights.items()}
            continue
        of_kind = [prefix for prefix in prefixes if (prefix in _AVERAGED_PREFIXES) == ema]
        others = [prefix for prefix in prefixes if prefix not in of_kind]
        if "" in groups or len(of_kind) > 1 or len(others) > 1:
            raise _mixed(weights, prefixes)
        chosen = (of_kind or others)[0]
        passed_over = others[0] if of_kind and others else passed_over
        averaged = averaged or chosen in _AVERAGED_PREFIXES
        weights = groups[chosen]
    return Unwrapped(weights, averaged, passed_over)


def _by_prefix(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The weights by their known prefix, which is taken off; those without one under an empty one."""
    groups: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        prefix = next((p for p in (*_PREFIXES, *_AVERAGED_PREFIXES) if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = array
    return groups


def _counts(name: str, array: Any) -> bool:
    return name.rpartition(".")[2] in _COUNTERS and getattr(array, "size", 1) == 1


def _mixed(weights: Mapping[str, Any], prefixes: Sequence[str]) -> UserError:
    bearing = [name for name in weights if name.startswith(tuple(prefixes))]
    bare = [name for name in weights if not name.startswith(tuple(prefixes))]
    rest = f", the others do not ({some(bare, 2)})" if bare else ""
    return UserError(
        f"{len(bearing)} of {len(weights)} names begin with {' or '.join(map(repr, prefixes))} "
        f"({some(bearing, 2)}){rest}: save the state dict of one network, all its names alike"
    )
