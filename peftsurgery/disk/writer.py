"""The only file that writes: directories that appear whole or not at all, and what lies in them."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.disk.shard import DTYPES
from peftsurgery.errors import CheckpointError

WORDS = {dtype: word for word, dtype in DTYPES.items()}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_DISK = "the checkpoint is on another file system"
FICLONE = 0x40049409
"""Linux's request to share a file's blocks (ioctl_ficlone(2))."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that a safetensors file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out` when the block ends well and vanishes when it does not.

    It is a hidden sibling of `out`, flushed to the disk and renamed in one step; whatever goes wrong,
    Ctrl-C included, `out` and the directories above it are as they were.

    Raises:
        CheckpointError: `out` is not a new or empty directory (before the block runs), or cannot be written.
    """
    final = out.expanduser().resolve()
    _check_free(final, out)
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    made = [parent for parent in final.parents if not parent.exists()]
    try:
        with _writing(temporary):
            temporary.mkdir(parents=True)
        yield temporary
        with _writing(out):
            _flush(temporary)
            temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise
    with _writing(out):
        _sync_directory(final.parent)


@contextmanager
def added(directory: Path, *names: str) -> Iterator[tuple[Path, ...]]:
    """Hidden files to write in an existing directory, which get their names when the block ends well.

    No other file of the directory is opened, and what goes wrong leaves none of them.
    """
    mark = f"partial-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = tuple(directory / f".{name}.{mark}" for name in names)
    try:
        yield temporary
        with _writing(directory):
            for file in temporary:
                _sync(file)
            for file, name in zip(temporary, names, strict=True):
                file.replace(directory / name)
            _sync_directory(directory)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def write_safetensors(
    file: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a new safetensors file from its announced `entries`, tensor by tensor as they come by.

    Exactly one tensor per entry is taken from `tensors`, in the same order; none is held.

    Raises:
        CheckpointError: the stream is not what was announced, or the file cannot be written.
    """
    coming = iter(tensors)
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = FileIO(file, "xb")
    with handle:
        _put(handle, _header(entries, metadata))
        for entry in entries:
            _put(handle, _raw(entry, next(coming, None)))
        with _writing(file):
            os.fsync(handle)


def write_json(file: Path, value: object) -> None:
    """Write `value` as readable JSON, in the order it has.

    Raises:
        CheckpointError: the file cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with _writing(file):
        file.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy what `source` holds, or what it links to.

    Raises:
        CheckpointError: the file cannot be read or written.
    """
    with _writing(target):
        shutil.copyfile(source, target)


def lend(source: Path, target: Path) -> tuple[str, str]:
    """Give `target` the bytes of `source`, written again only where that cannot be helped.

    What comes back is how, `reflink`, `hard link` or `copy`, and the reason of a copy. A reflink is a file
    of its own; a hard link is the same file under a second name. A link of a cache is never hard-linked,
    for what it leads to is the cache's.

    Raises:
        CheckpointError: the file cannot be read or written.
    """
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if _reflinked(source, target):
        return "reflink", ""
    if source.is_symlink():
        copy_file(source, target)
        return "copy", f"{source.name} is a symbolic link, as in a cache"
    try:
        os.link(source, target)
    except OSError as error:
        copy_file(source, target)
        return "copy", OTHER_DISK if error.errno == errno.EXDEV else error.strerror or str(error)
    return "hard link", ""


def _reflinked(source: Path, target: Path) -> bool:
    """Whether the file system made `target` share the blocks of `source`; if not, there is no `target`."""
    if sys.platform != "linux":
        return False
    import fcntl

    with _writing(target):
        here = target.open("xb")
    try:
        with here, source.open("rb") as there:
            fcntl.ioctl(here.fileno(), FICLONE, there.fileno())
    except OSError:
        target.unlink()
        return False
    return True


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Turns what the operating system says into what the user can do about it."""
    try:
        yield
    except OSError as error:
        remedy = "Make room, or write elsewhere" if error.errno in FULL else "Check the path and its rights"
        raise CheckpointError(
            f"{file} cannot be written: {error.strerror or error}. {remedy}; nothing was kept."
        ) from error


def _check_free(final: Path, out: Path) -> None:
    """Refuse an output that holds something, or that a rename could not replace."""
    if not final.exists():
        return
    if not final.is_dir():
        raise CheckpointError(
            f"{out} is a file. Name a directory that does not exist yet; nothing was written."
        )
    with _writing(out):
        held = next(final.iterdir(), None)
    if held is not None:
        raise CheckpointError(
            f"{out} is not empty (it holds {held.name!r}). Name a new directory; nothing was written."
        )
    if final == Path.cwd() or final.is_mount():
        raise CheckpointError(
            f"{out} is the current directory or a mount point, which cannot be replaced in one step. "
            f"Name a new directory in it, e.g. `{out / 'model'}`; nothing was written."
        )


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    said: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for entry in entries:
        span = [reached, reached + entry.nbytes]
        said[entry.name] = {"dtype": WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        reached = span[1]
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(entry: Entry, coming: tuple[str, Tensor] | None) -> memoryview:
    """The bytes of the tensor that came, which must be the one announced; a view where it can be."""
    if coming is None or Entry(coming[0], coming[1].dtype, tuple(coming[1].shape)) != entry:
        came = "nothing" if coming is None else f"{coming[0]!r} as {coming[1].dtype} {tuple(coming[1].shape)}"
        raise CheckpointError(
            f"{entry.name!r} was announced as {entry.dtype} {entry.shape} and {came} came. Nothing was kept."
        )
    return coming[1].detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _put(handle: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    with _writing(Path(os.fsdecode(handle.name))):
        while rest:
            rest = rest[handle.write(rest) :]


def _flush(directory: Path) -> None:
    """Bring every file and directory below to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder, name))
        _sync_directory(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _sync(path)


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return
