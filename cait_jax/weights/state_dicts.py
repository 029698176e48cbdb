"""State dicts in files: `.safetensors` and PyTorch's pickles in, without wrappers; `.safetensors` out."""

import argparse
import contextlib
import logging
import os
import pickle
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cait_jax.errors import UserError, Way, advise, one_line, setting, some
from cait_jax.files import fsync
from cait_jax.reading import check_regular

_log = logging.getLogger(__name__)

_PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
# A zip archive, or as older versions of PyTorch wrote it, a pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
# Keys under which checkpoints hold the weights, and those of their moving average.
_PLAIN = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "student",
)  # fmt: skip
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", "teacher",
)  # fmt: skip
# Prefixes of names, with which none of our networks' begins: of DistributedDataParallel, torch.compile,
# Lightning and other wrappers; of self-supervised pairs; of averages.
_PREFIXES = (
    "module.", "_orig_mod.", "model.", "network.", "net.", "backbone.", "encoder.", "student.", "online_model.",
    "state_dict.",
)  # fmt: skip
_AVERAGED_PREFIXES = ("ema.", "ema_model.", "model_ema.", "state_dict_ema.", "teacher.")
# Top-level modules of our networks: a state dict of one of them alone has it before every name.
_TOP_LEVEL = (
    "blocks", "blocks_token_only", "patch_embed", "norm", "fc_norm", "head", "head_dist", "stem", "s1", "s2", "s3",
    "s4",
)  # fmt: skip
# What averages count beside the weights.
_COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")
# Numbers checked at once.
_CHUNK = 2**22


class Unwrapped(NamedTuple):
    """What a wrapper held.

    Attributes:
      content: the state dict, or what may be one.
      averaged: it is a moving average.
      passed_over: the key or prefix of the other kind, where the file has both; empty if it has one.
    """

    content: Any
    averaged: bool
    passed_over: str


def read_weights(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads a state dict.

    Args:
      path: `.safetensors`, or `.pth`, `.pt` or `.bin` as `torch.save` writes them: a dict of tensors, alone
        or in a checkpoint under `"model"`, `"state_dict"` and the like. Prefixes that wrappers and compilers
        add to every name (`module.`, `_orig_mod.`, ...) are removed.
      ema: the moving average that the file holds beside the weights, as timm's and DeiT's checkpoints do.

    Returns:
      Name to array, in the file's dtypes, bfloat16 among them.

    Raises:
      UserError: the file is missing, empty, truncated or of another kind, holds something else than tensors, has
        a prefix before some names only, lacks the average, or is a pickle and PyTorch is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of weights: give a file ending in {', '.join(SUFFIXES)}"
        )
    try:
        check_regular(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "does not exist" if missing else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {what}: give the path of a file of weights") from error
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: download it again")
    if path.suffix in _PICKLES:
        outer = _read_pickle(path, ema)
    else:
        outer = Unwrapped(_read_safetensors(path), averaged=False, passed_over="")
    try:
        inner = strip_prefixes(outer.content, ema=ema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not inner.content:
        raise UserError(f"{path} holds no arrays: give a file of weights")
    other = inner.passed_over or outer.passed_over
    if ema and not (outer.averaged or inner.averaged):
        raise UserError(f"{path} holds no average of its weights: leave out {setting('ema', True)}")
    if other and not ema:
        how = advise(Way("load it by {}", "ema", True))
        _log.warning("%s also holds averaged weights (%s)%s", path, other, f": {how}" * bool(how))
    weights: dict[str, np.ndarray] = inner.content
    return weights


def write_safetensors(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict, dtypes unchanged, to a `.safetensors` file, which is replaced atomically.

    Raises:
      UserError: it could not be written; what was at `path` is still there then.
    """
    path = Path(path)
    replace_files(path.parent, {path.name: safetensors_writer(weights)})


def safetensors_writer(weights: Mapping[str, np.ndarray]) -> Callable[[Path], None]:
    """A writer of `weights` for `replace_files`."""
    from safetensors.numpy import save_file

    def write(path: Path) -> None:
        # The library writes the memory of an array, whatever its strides.
        arrays = {name: np.asarray(array, order="C") for name, array in weights.items()}
        save_file(arrays, path, {"format": "pt"})

    return write


def replace_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Replaces several files together: all are written and synced in a temporary directory, then renamed.

    Args:
      directory: made if missing; its other files stay.
      writers: file name to a function that writes the file at the path it is given. They are called in
        order, all with paths in one directory, so that a later one can read what an earlier one wrote.

    Raises:
      UserError: a file could not be written; `directory` is as it was then.
    """
    from safetensors import SafetensorError

    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as stage:
                staged = [Path(stage) / name for name in writers]
                for file, write in zip(staged, writers.values(), strict=True):
                    file.touch()
                    mode = file.stat().st_mode
                    write(file)
                    file.chmod(mode)  # safetensors makes a file of its own, for its owner alone
                    fsync(file)
                for file in staged:
                    file.replace(directory / file.name)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    directory.rmdir()
            raise
        fsync(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{' and '.join(writers)} could not be written in {directory} ({one_line(str(error))}): "
            "mend that or choose another place"
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, "safetensors file", error) from error


def _read_pickle(path: Path, ema: bool) -> Unwrapped:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch, which wrote it: "
            'pip install "cait-jax[torch]", or give a .safetensors file'
        ) from error

    with path.open("rb") as stream:
        if not stream.read(4).startswith(_PICKLE_STARTS):
            raise _broken(path, "file of PyTorch's", "it begins otherwise")
    try:
        # Training scripts keep their arguments so; making one runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which is not unpickled because it could run code: "
            "save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise _broken(path, "file of PyTorch's", error) from error

    found = unwrap(content, ema=ema, is_weight=torch.Tensor)
    content = found.content
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not named tensors: "
            "save a state dict with torch.save(model.state_dict(), path)"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path} holds {name!r}, of type {type(tensor).__name__}, where weights are expected: "
                "save a state dict with torch.save(model.state_dict(), path)"
            )
    return found._replace(
        content={name: _to_numpy(torch, tensor) for name, tensor in content.items()}
    )


def _broken(path: Path, kind: str, cause: Exception | str) -> UserError:
    reason = one_line(str(cause)).split(". ")[0] or type(cause).__name__
    return UserError(f"{path} is truncated or no {kind} ({reason}): download it again")


def _to_numpy(torch: types.ModuleType, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy has no name for
        import ml_dtypes

        return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def unwrap(content: Any, *, ema: bool, is_weight: type) -> Unwrapped:
    """The state dict in a training script's checkpoint, without optimiser state, epoch and arguments.

    Args:
      content: what the file holds.
      ema: the moving average, where the file has both.
      is_weight: the class of a weight.
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


def strip_prefixes(weights: Mapping[str, Any], *, ema: bool) -> Unwrapped:
    """Removes the prefixes that wrappers add to every name, and the counters of averages.

    A first part that all names share is a wrapper's too, whatever it is called.

    Args:
      weights: name to array.
      ema: where there are weights and their average (`online_model.x`, `ema_model.x`), the average.

    Raises:
      UserError: some names have a prefix and others none.
    """
    weights = {name: array for name, array in weights.items() if not _is_counter(name, array)}
    averaged, passed_over = False, ""
    while groups := _by_prefix(weights):
        prefixes = [prefix for prefix in groups if prefix]
        if not prefixes:
            common = {name.partition(".")[0] for name in weights}
            if (
                len(common) > 1
                or not common.isdisjoint(_TOP_LEVEL)
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
    """Known prefix, or an empty one, to the weights that have it, without it."""
    groups: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        prefix = next((p for p in (*_PREFIXES, *_AVERAGED_PREFIXES) if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = array
    return groups


def _is_counter(name: str, array: Any) -> bool:
    return name.rpartition(".")[2] in _COUNTERS and getattr(array, "size", 1) == 1


def _mixed(weights: Mapping[str, Any], prefixes: Sequence[str]) -> UserError:
    bearing = [name for name in weights if name.startswith(tuple(prefixes))]
    bare = [name for name in weights if not name.startswith(tuple(prefixes))]
    rest = f", the others do not ({some(bare, 2)})" if bare else ""
    return UserError(
        f"{len(bearing)} of {len(weights)} names begin with {' or '.join(map(repr, prefixes))} "
        f"({some(bearing, 2)}){rest}: save the state dict of one network, all its names alike"
    )


def check_finite(weights: Mapping[str, Any], dtype: Any = None) -> None:
    """Refuses weights that hold NaN or infinity, or would after a cast to `dtype`.

    Raises:
      UserError: naming the first of them, how many of its numbers are not finite, and how many more have such.
    """
    bad = {name: count for name, array in weights.items() if (count := _not_finite(array, None))}
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and so have {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{name} has {count:,} of {np.size(weights[name]):,} numbers that are NaN or infinite{more}: the run "
            "that wrote these weights diverged, or the file is damaged; take an earlier checkpoint"
        )
    if dtype is None:
        return
    for name, array in weights.items():
        if count := _not_finite(array, dtype):
            raise UserError(
                f"{name} has {count:,} numbers that {np.dtype(dtype).name} cannot hold: keep a wider dtype"
            )


def _not_finite(array: Any, dtype: Any) -> int:
    """How many numbers are not finite after a cast to `dtype`; of integers none."""
    array = np.asarray(array)
    if array.dtype.kind in "biuSU":
        return 0
    flat, count = array.reshape(-1), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            part = part if dtype is None else part.astype(dtype)
            count += part.size - int(np.count_nonzero(np.isfinite(part)))
    return count
