"""Which file it is: enough to tell two apart without reading gigabytes, or all of it where that is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsurgery.disk.shard import PREFIX
from peftsurgery.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Identity:
    """What a safetensors file is known by.

    Args:
        size: in bytes.
        header_sha256: of the length prefix and the header: names, dtypes, shapes, offsets and metadata, and no value.
        sha256: of the whole file, where it was computed.
    """

    size: int
    header_sha256: str
    sha256: str | None = None

    def matches(self, other: Identity) -> bool:
        """Whether both can be the same file, as far as both know."""
        known = self.sha256 is not None and other.sha256 is not None
        same = (self.size, self.header_sha256) == (other.size, other.header_sha256)
        return same and (not known or self.sha256 == other.sha256)

    def to_dict(self) -> dict[str, Any]:
        """As JSON says it; a hash that was not computed is left out."""
        whole = {} if self.sha256 is None else {"sha256": self.sha256}
        return {"size": self.size, "header_sha256": self.header_sha256, **whole}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Identity:
        """What `to_dict` said."""
        return cls(int(said["size"]), str(said["header_sha256"]), said.get("sha256"))


def identify(file: Path, *, full: bool = False) -> Identity:
    """The identity of a safetensors file.

    Args:
        full: hash every byte too.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(PREFIX)
            header = hashlib.sha256(prefix + handle.read(min(int.from_bytes(prefix, "little"), size)))
        return Identity(size, header.hexdigest(), file_sha256(file) if full else None)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error


def file_sha256(file: Path) -> str:
    """The SHA-256 of a whole file, read once and leaving nothing of it in memory."""
    with file.open("rb", buffering=0) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
