"""Files on the Hugging Face hub: downloads into its cache, and saved models by the address `hf://NAMESPACE/NAME`.

`@COMMIT` (or a branch or tag) at the end of an address names a revision; without one it is the newest.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from cait_jax.errors import Literal, UserError, one_line, setting
from cait_jax.reading import read_json
from cait_jax.weights.saved import CONFIG, SECTION, WEIGHTS

_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<![.-])", re.ASCII)
Place = str | os.PathLike[str]


class Fetched(NamedTuple):
    """A file in the hub's cache, and whether it was downloaded now."""

    path: Path
    is_new: bool


def fetch_file(
    repository: str, file: str, revision: str | None = None, *, what: str, instead: str
) -> Fetched:
    """A file of a repository, downloaded unless the hub's cache holds it. Read-only.

    Args:
      repository: `NAMESPACE/NAME`.
      file: its path there.
      revision: None: the newest.
      what: the file is, in the words of an error.
      instead: what to do where it cannot be had, such as "give weights=PATH".

    Raises:
      UserError: the hub cannot be reached and the cache lacks the file, the hub refuses, or the download
        breaks off.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    cached = hub.try_to_load_from_cache(repository, file, revision=revision)
    fixed = revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None
    if isinstance(cached, str) and (fixed or constants.HF_HUB_OFFLINE):
        return Fetched(Path(cached), False)
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{what} ({repository}) are not in the cache at {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            f"downloading them: unset it, or {instead}"
        )
    try:
        hub.get_hf_file_metadata(
            hub.hf_hub_url(repository, file, revision=revision),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        refused = status in (401, 403, 404)
        if isinstance(cached, str) and not refused:
            return Fetched(Path(cached), False)
        fix = "check that it exists and may be read" if refused else "try again later"
        raise UserError(
            f"the hub at {constants.ENDPOINT} refused {file} of {repository} (HTTP {status}): {fix}, or {instead}"
        ) from error
    except Exception as error:  # of its HTTP library, another one in each major version
        if isinstance(cached, str):
            return Fetched(Path(cached), False)
        raise UserError(
            f"the hub at {constants.ENDPOINT} cannot be reached for {repository} ({cause(error)}): connect to the "
            f"network, set HF_HUB_OFFLINE=1 with a cache that holds it, or {instead}"
        ) from error
    try:
        path = hub.hf_hub_download(repository, file, revision=revision)
    except Exception as error:
        raise UserError(
            f"the download of {file} of {repository} from {constants.ENDPOINT} broke off ({cause(error)}): try "
            f"again, or {instead}"
        ) from error
    return Fetched(Path(path), path != cached)


def cause(error: BaseException) -> str:
    """An error of a library in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def is_address(place: Place) -> bool:
    """Whether it is `hf://...`, which a `Path` holds as `hf:/...`."""
    return os.fspath(place).startswith("hf:/")


def as_written(place: Place) -> str:
    """A path or an address as text."""
    text = os.fspath(place)
    return f"hf://{text[4:].lstrip('/')}" if is_address(place) else text


def check_repository(repository: str, example: str) -> str:
    """`NAMESPACE/NAME`, as the hub allows it.

    Raises:
      UserError: it is none; the error shows what should have been given, `example`.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(
            f"{repository!r} is no repository of the hub: give {example}, of letters, digits, '-', '_' and '.'"
        )
    return repository


def local(place: Place, *, weights: bool = True) -> Path:
    """A path as it is; of an address the directory in the hub's cache, with the saved model.

    Args:
      place: a path or an address.
      weights: download them too, and not `config.json` alone.

    Raises:
      UserError: the address is malformed, the files cannot be had, or are no saved model of this package.
    """
    if not is_address(place):
        return Path(place)
    address = as_written(place)
    match = _ADDRESS.fullmatch(address)
    example = "hf://NAMESPACE/NAME or hf://NAMESPACE/NAME@COMMIT"
    if match is None:
        raise UserError(f"{address} is no address of the hub: give {example}")
    repository = check_repository(match["repository"], example)
    texts = {
        "what": f"the files of {address}",
        "instead": f"give {setting('name_or_path', Literal('DIR'))}, a copy of it",
    }
    config = fetch_file(repository, CONFIG, match["revision"], **texts).path
    _check_ours(address, config)
    if weights:  # of the same commit, which is the directory's name
        fetch_file(repository, WEIGHTS, config.parent.name, **texts)
    return config.parent


def _check_ours(address: str, config: Path) -> None:
    try:
        found = read_json(config)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{CONFIG} of {address} cannot be read ({error}): have it saved again"
        ) from error
    if not (isinstance(found, dict) and SECTION in found):
        raise UserError(
            f"{CONFIG} of {address} is not of this package and does not say which network its weights are of: "
            f"download {WEIGHTS}, and give {setting('name_or_path', Literal('NAME'))} and "
            f"{setting('weights', Literal('FILE'))}"
        )
