"""Uploads to the Hugging Face hub, by the login that its own tools keep (`hf auth login`, `HF_TOKEN`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cait_jax.errors import UserError
from cait_jax.reading import read_json
from cait_jax.weights.hub_files import cause, check_repository, fetch_file
from cait_jax.weights.saved import CONFIG, SECTION, WEIGHTS


class Target(NamedTuple):
    """A repository to upload to.

    Attributes:
      repository: `NAMESPACE/NAME`.
      address: of its page.
      private: whether others cannot see it.
      files: that it has already; None: there is no such repository yet.
      commit: its newest; None where there is none.
    """

    repository: str
    address: str
    private: bool
    files: tuple[str, ...] | None
    commit: str | None


def find_target(repository: str, *, public: bool) -> Target:
    """The repository, if this login may upload a model to it. Nothing is changed on the hub.

    Raises:
      UserError: the name is none of the hub's, nobody is logged in, the login may not write there, or what is
        there is no model of this package, or public where it should be private, or the reverse.
    """
    from huggingface_hub import constants, errors

    check_repository(repository, "NAMESPACE/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE forbids uploads: unset it")
    api = _api()
    _check_login(api, repository.partition("/")[0])
    address = f"{constants.ENDPOINT}/{repository}"
    with _said(repository, "be asked about"):
        try:
            found = api.model_info(repository)
        except errors.RepositoryNotFoundError:
            return Target(repository, address, not public, None, None)
    files = tuple(each.rfilename for each in found.siblings or ())
    _check_ours(repository, files, found.sha)
    if bool(found.private) == public:
        raise UserError(
            f"{repository} is on the hub already and private: leave out --public, or make it public in "
            f"{address}/settings"
            if public
            else f"{repository} is on the hub already and public: add --public, or choose another name"
        )
    return Target(repository, address, bool(found.private), files, found.sha)


def upload(target: Target, folder: Path, names: Sequence[str], *, message: str) -> str:
    """Uploads files of a folder in one commit, and makes the repository if there is none.

    Files that the hub has already, of an upload that was interrupted too, are not sent again. Until the commit
    whoever loads the model gets the one before.

    Returns:
      The commit.

    Raises:
      UserError: the hub refuses, cannot be reached, or the upload breaks off.
    """
    import huggingface_hub as hub

    api = _api()
    with _said(target.repository, "be made"):
        if target.files is None:
            api.create_repo(target.repository, private=target.private)
    operations = [hub.CommitOperationAdd(name, str(folder / name)) for name in names]
    with _said(target.repository, "be written"):
        commit = api.create_commit(target.repository, operations, commit_message=message)
    return str(commit.oid)


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _check_login(api: Any, namespace: str) -> None:
    from huggingface_hub import constants, errors

    again = "log in by `hf auth login`, with a token that may write"
    with _said(namespace, "be asked about"):
        try:
            found = api.whoami()
        except errors.LocalTokenNotFoundError as error:
            raise UserError(
                f"nobody is logged in to the hub at {constants.ENDPOINT}: {again}"
            ) from error
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise UserError(
                f"the hub at {constants.ENDPOINT} does not know the token of this login: {again}, or set another "
                "HF_TOKEN"
            ) from error
    token = found.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(f"the token of this login may only read: {again}")
    places = [found["name"], *(each["name"] for each in found.get("orgs", ()))]
    if namespace.lower() not in [place.lower() for place in places]:
        others = f" or to an organisation of it ({', '.join(places[1:])})" if places[1:] else ""
        raise UserError(
            f"this login is of {places[0]}, which is not in {namespace}: push to {places[0]}/NAME{others}"
        )


def _check_ours(repository: str, files: Sequence[str], commit: str) -> None:
    """Refuses to write over files of something else."""
    if set(files) <= {".gitattributes", "README.md"}:
        return
    ours = False
    if {CONFIG, WEIGHTS} <= set(files):
        texts = {"what": f"the files of {repository}", "instead": "choose another name"}
        try:
            config = read_json(fetch_file(repository, CONFIG, commit, **texts).path)
            ours = isinstance(config, dict) and SECTION in config
        except (OSError, ValueError):
            ours = False
    if not ours:
        raise UserError(
            f"{repository} is on the hub already and holds no model of this package: choose another name"
        )


@contextmanager
def _said(repository: str, what: str) -> Iterator[None]:
    """Errors of the hub's library as sentences."""
    from huggingface_hub import constants

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of its HTTP library, another one in each major version
        status = _status(error)
        hub = f"the hub at {constants.ENDPOINT}"
        if status is None:
            raise UserError(
                f"{repository} cannot {what}, as {hub} cannot be reached or broke off ({cause(_root(error))}): "
                "run the same command again, which sends what is missing"
            ) from error
        fix = _FIXES.get(status, "run the same command again later")
        raise UserError(
            f"{repository} cannot {what}: {hub} refused (HTTP {status}): {fix}"
        ) from error


_FIXES = {
    401: "log in by `hf auth login`, with a token that may write",
    403: "log in by `hf auth login`, with a token that may write there",
    404: "it is gone; run the same command again, which makes it",
    409: "something of this name is there already; choose another",
    412: "it was changed meanwhile; run the same command again",
}


def _root(error: BaseException) -> BaseException:
    """What an error was raised from in the end: the library names the file alone."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """The status of the answer that an error, or one that it was raised from, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None
