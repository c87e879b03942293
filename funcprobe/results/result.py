"""The common part of all results: told in blocks, kept in a folder, with the provenance of their numbers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import ClassVar, Self

from funcprobe.results import hub, storage
from funcprobe.results.blocks import Block, as_html, as_text
from funcprobe.results.codec import Inline
from funcprobe.results.provenance import BatchCounts, Provenance
from funcprobe.types import Json


class Result:
    """A result: frozen, told in blocks, kept in a folder."""

    kind: ClassVar[storage.Kind]  #: what its file says that it is

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the result, in order: sentences, tables, remarks and figures.

        Raises:
            NotImplementedError: For a result that has nothing to say.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """Return a text that reads in ten seconds: the answer first, the numbers, and how far to trust them."""
        return as_text(self.blocks())

    def _repr_html_(self) -> str:
        return as_html(self.blocks())

    def to_dict(self) -> Json:
        """Return it as values that JSON can carry, arrays as lists; `save` keeps those in a file of their own."""
        return storage.plain_of(self, Inline())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder `path`, whole or not at all: `result.json`, and `result.safetensors` where there are arrays.

        Raises:
            InputError: If the folder exists and `overwrite` is false.
        """
        return storage.save(self, path, overwrite=overwrite)

    def write_into(self, folder: Path) -> None:
        """Write its files into an existing folder."""
        storage.write_into(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        path_in_repo: str = "",
        *,
        private: bool = True,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Send the files that `save` writes to a dataset repository, and return the address that `load` reads.

        The address names the commit: `hf://datasets/owner/name@commit/path`. A result may hold the text of prompts.

        Args:
            repo_id: owner/name; a repository that is not there is made.
            path_in_repo: The folder in it; files of an earlier result there are replaced.
            private: Whether a repository that is made is private.
            revision: The branch to commit to, which has to be there; by default the main one.
            token: By default the one of `hf auth login`.
            commit_message: By default the kind of result.

        Raises:
            InputError: If there can be no such repository or path, or it cannot be written.
            MissingExtraError: If huggingface_hub is not installed.
        """
        address = hub.checked(hub.Address(repo_id, path_in_repo.strip("/"), revision))
        message = commit_message or f"Add a {self.kind} of funcprobe"
        with tempfile.TemporaryDirectory() as place:
            self.write_into(Path(place))
            return str(hub.pushed(Path(place), address, private=private, token=token, message=message))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a folder that `save` wrote, or one of the Hub, `hf://datasets/owner/name[@revision][/path]`.

        Raises:
            InputError: If there is none at `path`, it is damaged, of another kind, or of another schema version.
        """
        return storage.load(cls, path)


class Measured(Result):
    """A result that knows its own provenance."""

    provenance: Provenance

    @property
    def evaluation(self) -> BatchCounts:
        """Size of E."""
        return self.provenance.evaluation

    @property
    def batch(self) -> BatchCounts | None:
        """Size of U; None for an update that was not made from a batch."""
        return self.provenance.batch

    @property
    def mode(self) -> str:
        """How the first order was taken: "forward" or "reverse"."""
        return self.provenance.mode

    @property
    def environment(self) -> Json:
        """Versions, device, threads, precision."""
        return self.provenance.environment

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase."""
        return self.provenance.timings
