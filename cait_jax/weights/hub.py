"""Released weights from the Hugging Face hub, or from its cache on this machine."""

import hashlib
import os
from pathlib import Path

from cait_jax.checkpoint.seal import one_line
from cait_jax.errors import UserError
from cait_jax.interface import Literal, setting
from cait_jax.weights.released import Released

_FILE = "model.safetensors"


def download(released: Released) -> Path:
    """The file of released weights, downloaded unless the hub's cache holds it.

    `huggingface_hub` does the work, so that its cache, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` and tokens
    apply. The hub is asked once before anything is fetched: without a network the library itself would go on
    asking for minutes.

    Args:
      released: a row of the table.

    Returns:
      The path of a `.safetensors` file in the cache; not to be changed.

    Raises:
      UserError: the hub cannot be reached and the cache lacks the file, the hub refuses, the download
        breaks off, or the file's SHA-256 is not the table's.
    """
    file = _fetch(released)
    if released.sha256:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != released.sha256:
            raise UserError(
                f"{file} has SHA-256 {found} instead of {released.sha256}: remove "
                f"{os.path.realpath(file)} and download it again"
            )
    return file


def _fetch(released: Released) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    repository, revision = released.hub_id, released.revision or None
    cached = hub.try_to_load_from_cache(repository, _FILE, revision=revision)
    if isinstance(cached, str) and (revision or constants.HF_HUB_OFFLINE):
        return Path(cached)
    by_hand = f"give {setting('weights', Literal('PATH'))} with a file of {released.name}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"the weights of {released.name} ({repository}) are not in the cache at "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids downloading them: unset it, or "
            f"{by_hand}"
        )
    try:
        hub.get_hf_file_metadata(
            hub.hf_hub_url(repository, _FILE, revision=revision),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        refused = status in (401, 403, 404)
        if isinstance(cached, str) and not refused:
            return Path(cached)
        fix = "check that it exists and may be read" if refused else "try again later"
        raise UserError(
            f"the hub at {constants.ENDPOINT} refused {_FILE} of {repository} (HTTP {status}): {fix}, "
            f"or {by_hand}"
        ) from error
    except Exception as error:  # of its HTTP library, another one in each major version
        if isinstance(cached, str):
            return Path(cached)
        raise UserError(
            f"the hub at {constants.ENDPOINT} cannot be reached for {repository} ({_cause(error)}): "
            f"connect to the network, set HF_HUB_OFFLINE=1 with a cache that holds it, or {by_hand}"
        ) from error
    try:
        return Path(hub.hf_hub_download(repository, _FILE, revision=revision))
    except Exception as error:
        raise UserError(
            f"the download of {_FILE} of {repository} from {constants.ENDPOINT} broke off "
            f"({_cause(error)}): try again, or {by_hand}"
        ) from error


def _cause(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
