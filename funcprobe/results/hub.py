"""Results in a dataset repository of the Hugging Face Hub: pushed and read when asked, and never otherwise.

    hf://datasets/owner/name[@revision][/path]

A push is one commit of the files that `save` writes. A read fetches those files and no others, of one commit, into the
cache of `huggingface_hub`; they are data, and the loader holds them against their digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import quote, unquote

from funcprobe import __version__
from funcprobe.errors import InputError, missing_extra

SCHEME = "hf://"

_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/pr/\d+|[^/]+))?(/(?P<path>.*))?")

#: A part of a repository's name, and of a path in it.
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9]", re.ASCII)
_PART = re.compile(r"(?!\.{1,2}$)[^/\\\0]+")


class Address(NamedTuple):
    """A folder of a dataset repository."""

    repo: str  #: owner/name
    path: str = ""  #: in the repository; "" is its root
    revision: str | None = None  #: a branch, a tag or a commit; None is the main branch

    @classmethod
    def of(cls, text: str) -> Address:
        """Return the address that a text is.

        Raises:
            InputError: If it is none.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise InputError(f"'{text:.200}' is no address; expected hf://datasets/owner/name[@revision][/path].")
        revision = found["revision"]
        path = (found["path"] or "").strip("/")
        return checked(cls(found["repo"], path, None if revision is None else unquote(revision)))

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"{SCHEME}datasets/{self.repo}{at}" + (f"/{self.path}" if self.path else "")


def checked(address: Address) -> Address:
    """Return an address whose repository and path may exist, before anything is asked of the Hub.

    Raises:
        InputError: If one of them may not.
    """
    owner, _, name = address.repo.partition("/")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)):
        raise InputError(
            f"'{address.repo:.200}' is no name of a dataset repository; expected owner/name, of letters, digits and "
            "'-', '_', '.' between them."
        )
    if address.path and not all(map(_PART.fullmatch, address.path.split("/"))):
        raise InputError(f"'{address.path:.200}' is no path in a repository; expected names with '/' between them.")
    return address


def fetched(address: Address, names: Iterable[str]) -> Path:
    """Return a folder with those of the named files that stand at an address, of one commit.

    Raises:
        InputError: If repository or revision are not there, or cannot be reached.
        MissingExtraError: If huggingface_hub is not installed.
    """
    hub = _hub("reading from the Hub")
    prefix = f"{escape(address.path)}/" if address.path else ""
    with _calmly(hub, address, "read"):
        folder = hub.snapshot_download(
            address.repo,
            repo_type="dataset",
            revision=address.revision,
            allow_patterns=[prefix + name for name in names],
            library_name="funcprobe",
            library_version=__version__,
        )
    return Path(folder, address.path)


def pushed(folder: Path, address: Address, *, private: bool, token: str | None, message: str) -> Address:
    """Send the files of a folder in one commit, and return their address at it.

    A repository that is not there is made, private or public.

    Raises:
        InputError: If the repository or the revision cannot be written.
        MissingExtraError: If huggingface_hub is not installed.
    """
    hub = _hub("pushing to the Hub")
    api = hub.HfApi(token=token, library_name="funcprobe", library_version=__version__)
    prefix = f"{address.path}/" if address.path else ""
    files = [
        hub.CommitOperationAdd(path_in_repo=prefix + file.name, path_or_fileobj=str(file))
        for file in sorted(folder.iterdir())
    ]
    with _calmly(hub, address, "written"):
        api.create_repo(address.repo, repo_type="dataset", private=private, exist_ok=True)
        made = api.create_commit(
            address.repo, files, commit_message=message, repo_type="dataset", revision=address.revision
        )
    return address._replace(revision=made.oid)


def _hub(purpose: str) -> ModuleType:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        missing = missing_extra("huggingface_hub", "hub", purpose)
        raise missing from error
    return huggingface_hub


@contextmanager
def _calmly(hub: ModuleType, address: Address, done: str) -> Iterator[None]:
    """Say in a sentence why the Hub cannot be read or written.

    Raises:
        InputError: In the place of whatever the client raises.
    """
    try:
        yield
    except Exception as error:  # the client raises its own errors, and those of whichever HTTP library it has
        raise InputError(f"{address} cannot be {done}: {_reason(hub, error)}.") from error


#: Errors of the client that say by their type what is wrong, the narrower first.
_REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it to use the network",
    "LocalEntryNotFoundError": "the Hub is out of reach, or HF_HUB_OFFLINE is set, and the cache does not hold it",
    "RevisionNotFoundError": "the repository has no such revision; expected a branch, a tag or a commit that is there",
    "GatedRepoError": "the repository is gated; ask for access on its page",
    "RepositoryNotFoundError": "there is none, or the token may not see it; check the name, or log in (hf auth login)",
}


def _reason(hub: ModuleType, error: Exception) -> str:
    """Return in words why the client failed: by the error's type, by the answer's status, or as it says itself."""
    for name, words in _REASONS.items():
        if isinstance(error, getattr(hub.errors, name)):
            return words
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return "the token is missing, or may not write there; log in (hf auth login), or give token=..."
    first, *_ = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return f"the client says: {first.rstrip('.'):.300}"
