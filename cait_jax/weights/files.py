"""Files of named arrays: `.safetensors` and PyTorch's pickles in, `.safetensors` out."""

import argparse
import contextlib
import logging
import os
import pickle
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cait_jax.checkpoint.seal import fsync, one_line
from cait_jax.errors import UserError
from cait_jax.interface import Way, advise, setting
from cait_jax.weights.wrappers import Unwrapped, strip, unwrap

_log = logging.getLogger(__name__)

_PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
# A zip archive, or as older versions of PyTorch wrote it, a pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


def read_weights(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads a file of named arrays.

    Args:
      path: `.safetensors`, or `.pth`, `.pt` or `.bin` as `torch.save` writes them: a dict of tensors, alone
        or in a checkpoint under `"model"`, `"state_dict"` and the like. Prefixes that wrappers and compilers put
        before every name (`module.`, `_orig_mod.`, ...) are dropped.
      ema: the moving average that the file holds beside the weights, as timm's and DeiT's checkpoints do.

    Returns:
      Name to array. Dtypes are those of the file, bfloat16 among them.

    Raises:
      UserError: the file is missing, empty, cut short or of another kind, holds something else than tensors, has a
        prefix before some names only, lacks the average, or is a pickle and PyTorch is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of weights: give a file ending in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give the path of a file of weights")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: download it again")
    if path.suffix in _PICKLES:
        outer = _read_pickle(path, ema)
    else:
        outer = Unwrapped(_read_safetensors(path), averaged=False, passed_over="")
    try:
        inner = strip(outer.content, ema=ema)
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
    return inner.content


def write_safetensors(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays to a `.safetensors` file, whole or not at all.

    Args:
      path: the file, replaced if it exists; its directory is made if missing.
      weights: name to array; dtypes are kept.

    Raises:
      UserError: the disk refuses; what was at `path` is still there then.
    """
    path = Path(path)
    replace_files(path.parent, {path.name: safetensors_writer(weights)})


def safetensors_writer(weights: Mapping[str, np.ndarray]) -> Callable[[Path], None]:
    """A writer of `weights` for `replace_files`."""
    from safetensors.numpy import save_file

    def write(path: Path) -> None:
        # The library writes memory as it lies, whatever the strides say.
        arrays = {name: np.asarray(array, order="C") for name, array in weights.items()}
        save_file(arrays, path, {"format": "pt"})

    return write


def replace_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Puts files in place together: all are written and synced beside their places, then renamed.

    Args:
      directory: where they go, made if missing; files of other names in it stay.
      writers: file name to a function that writes the file at the path it is given. They are called in
        order, all with paths in one directory, so that a later one can read what an earlier one wrote.

    Raises:
      UserError: the disk refuses; `directory` is as it was then.
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
    said = one_line(str(cause)).split(". ")[0] or type(cause).__name__
    return UserError(f"{path} is cut short or no {kind} ({said}): download it again")


def _to_numpy(torch: types.ModuleType, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy has no name for
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
