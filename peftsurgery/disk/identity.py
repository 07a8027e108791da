"""Which file it is: enough to tell two apart without reading gigabytes, or all of it where that is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftsurgery.disk.rooms import PAGE
from peftsurgery.disk.shard import PREFIX
from peftsurgery.errors import CheckpointError

SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """What a safetensors file is known by.

    Args:
        size: in bytes.
        header_sha256: of the length prefix and the header: names, dtypes, shapes, offsets and metadata, and no value.
        sample_sha256: of `SAMPLES` pages, spread evenly over the file: another training of the same shapes has others.
        sha256: of the whole file, where it was computed.
    """

    size: int
    header_sha256: str
    sample_sha256: str
    sha256: str | None = None

    def matches(self, other: Identity) -> bool:
        """Whether both can be the same file, as far as both know."""
        known = self.sha256 is not None and other.sha256 is not None
        return self._quick == other._quick and (not known or self.sha256 == other.sha256)

    @property
    def _quick(self) -> tuple[int, str, str]:
        return self.size, self.header_sha256, self.sample_sha256

    def to_dict(self) -> dict[str, Any]:
        """As JSON says it; a hash that was not computed is left out."""
        return {word: value for word, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Identity:
        """What `to_dict` said.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            int(said["size"]), str(said["header_sha256"]), str(said["sample_sha256"]), said.get("sha256")
        )


def identify(file: Path, *, full: bool = False) -> Identity:
    """The identity of a safetensors file.

    Args:
        full: hash every byte too.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as handle:
            prefix = handle.read(PREFIX)
            header = hashlib.sha256(prefix + handle.read(min(int.from_bytes(prefix, "little"), size)))
            sample = hashlib.sha256()
            for number in range(SAMPLES):
                handle.seek(size * number // SAMPLES)
                sample.update(handle.read(PAGE))
        return Identity(size, header.hexdigest(), sample.hexdigest(), file_sha256(file) if full else None)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error


def known(file: Path, *, full: bool = False) -> Identity:
    """`identify`, asked once of a file that does not change.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _asked(file, stamp(file), full)


@cache
def _asked(file: Path, stamp: Stamp, full: bool) -> Identity:
    return identify(file, full=full)


Stamp = tuple[int, int, int]
"""What is another when a file was written to: its inode, size, and time of change in nanoseconds."""


def stamp(file: Path) -> Stamp:
    """The file's stamp.

    Raises:
        CheckpointError: it is gone.
    """
    try:
        at = file.stat()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error
    return at.st_ino, at.st_size, at.st_mtime_ns


def file_sha256(file: Path) -> str:
    """The SHA-256 of a whole file, read once and leaving nothing of it in memory."""
    with file.open("rb", buffering=0) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
