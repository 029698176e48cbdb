"""Pins of released weights: the commit of each hub repository, and the SHA-256 of its file.

`cait models --pin FILE` asks the hub for them. With `CAIT_PINS=FILE` in the environment downloads are of these
commits, and a file with another checksum is refused.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cait_jax.errors import UserError
from cait_jax.files import atomic_replace
from cait_jax.reading import check_format, read_json

VARIABLE = "CAIT_PINS"
_FORMAT = 1
_HEX = {"revision": re.compile(r"[0-9a-f]{40}"), "sha256": re.compile(r"[0-9a-f]{64}")}


class Pin(NamedTuple):
    """A commit of a repository, and the SHA-256 of its weights in hexadecimal."""

    revision: str
    sha256: str


def find_pin(repository: str) -> Pin | None:
    """The pin of a repository in the file that the environment names; None where it names no file or has no pin.

    Raises:
      UserError: the file cannot be read, or is none of pins.
    """
    file = os.environ.get(VARIABLE)
    return read_pins(Path(file)).get(repository) if file else None


def read_pins(path: Path) -> dict[str, Pin]:
    """The pins in a file, by repository.

    Raises:
      UserError: it cannot be read, or is none of pins.
    """
    again = "write it by `cait models --pin FILE`, or unset the variable"
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"{VARIABLE}: {path} cannot be read ({error.strerror}): {again}") from error
    except ValueError as error:
        raise UserError(f"{VARIABLE}: {path} is no file of pins ({error}): {again}") from error
    if isinstance(found, dict) and "format" in found:
        check_format(path, found["format"], _FORMAT)
    if not (isinstance(found, dict) and isinstance(found.get("pins"), dict)):
        raise UserError(f"{VARIABLE}: {path} is no file of pins: {again}")
    for repository, pin in found["pins"].items():
        if not (isinstance(pin, dict) and all(_is_hex(pin.get(name), name) for name in _HEX)):
            raise UserError(f"{VARIABLE}: {path} has no pin for {repository!r}: {again}")
    return {name: Pin(pin["revision"], pin["sha256"]) for name, pin in found["pins"].items()}


def write_pins(path: Path, pins: Mapping[str, Pin]) -> None:
    """Writes a file of pins."""
    content = {"format": _FORMAT, "pins": {name: pin._asdict() for name, pin in pins.items()}}
    with atomic_replace(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def ask_for_pins(repositories: Iterable[str], file: str) -> dict[str, Pin]:
    """The newest commit of each repository on the hub, and the SHA-256 of its `file`, which is not downloaded.

    Raises:
      UserError: the hub cannot be reached or refuses, or names no checksum.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    pins = {}
    for repository in repositories:
        try:
            found: Any = hub.get_hf_file_metadata(
                hub.hf_hub_url(repository, file), timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except Exception as error:  # of its HTTP library, another one in each major version
            raise UserError(
                f"the hub at {constants.ENDPOINT} does not answer for {repository} ({type(error).__name__}): "
                "connect to the network, or try again later"
            ) from error
        pin = Pin(found.commit_hash or "", found.etag or "")
        if not all(_is_hex(value, name) for name, value in pin._asdict().items()):
            raise UserError(
                f"the hub at {constants.ENDPOINT} names no commit and SHA-256 of {file} in {repository}: pin it "
                "by hand"
            )
        pins[repository] = pin
    return pins


def _is_hex(value: Any, name: str) -> bool:
    return isinstance(value, str) and _HEX[name].fullmatch(value) is not None
