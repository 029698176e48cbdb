"""Files of named arrays: `.safetensors` and PyTorch's pickles in, `.safetensors` out."""

import contextlib
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

_PICKLES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
# What the first releases and training scripts wrap a state dict in.
_WRAPPERS = ("model", "state_dict")
# What PyTorch's DistributedDataParallel puts before every name.
_PARALLEL = "module."
# A zip archive, or as older versions of PyTorch wrote it, a pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a file of named arrays.

    Args:
      path: `.safetensors`, or `.pth`, `.pt` or `.bin` as `torch.save` writes them: a dict of tensors, alone
        or under `"model"` or `"state_dict"`. A `module.` before every name is dropped.

    Returns:
      Name to array. Dtypes are those of the file, bfloat16 among them.

    Raises:
      UserError: the file is missing, empty, cut short or of another kind, holds something else than
        tensors, or is a pickle and PyTorch is not installed.
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
    weights = _read_pickle(path) if path.suffix in _PICKLES else _read_safetensors(path)
    if not weights:
        raise UserError(f"{path} holds no arrays: give a file of weights")
    if all(name.startswith(_PARALLEL) for name in weights):
        return {name.removeprefix(_PARALLEL): array for name, array in weights.items()}
    return weights


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


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which is not unpickled because it could run code: "
            "save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise _broken(path, "file of PyTorch's", error) from error

    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
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
    return {name: _to_numpy(torch, tensor) for name, tensor in content.items()}


def _broken(path: Path, kind: str, cause: Exception | str) -> UserError:
    said = one_line(str(cause)).split(". ")[0] or type(cause).__name__
    return UserError(f"{path} is cut short or no {kind} ({said}): download it again")


def _to_numpy(torch: types.ModuleType, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy has no name for
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
