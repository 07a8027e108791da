"""A file of known size that several threads fill, past the cache of the system where it lets them.

Buffered writes of many gigabytes are copied once more, crowd other programs out of the page cache, and threads that
write one file wait for each other. Direct ones (O_DIRECT) do none of that; they take whole pages only, so that what
lies before the first and after the last page of a write goes through the cache all the same.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from peftsurgery.disk.durable import opened, rename, writing
from peftsurgery.disk.durable import put as write
from peftsurgery.disk.halfway import unfinished
from peftsurgery.disk.rooms import PAGE

DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has no such thing."""
FICLONERANGE = 0x4020940D
"""Linux's request to share a part of a file's blocks (ioctl_ficlonerange(2))."""
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(slots=True)
class Output:
    """An open file.

    Args:
        plain: the descriptor for writes through the cache.
        direct: the one for writes past it; None where the file system has none.
        shares: whether the file system lets it share pages with other files.
    """

    file: Path
    plain: int
    direct: int | None
    shares: bool = False


@contextmanager
def output(file: Path, mode: int | None = None, *, keep: bool = False) -> Iterator[Output]:
    """A file to fill, which gets its name, and is on the disk, when the block ends well.

    Args:
        mode: its permissions; what the user's mask leaves by default.
        keep: go on with what is there of it.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = unfinished(file)
    if not keep:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
    with opened(temporary, new=not keep) as plain, past_cache(temporary) as direct:
        if mode is not None:
            with writing(file):
                os.fchmod(plain, mode)
        yield Output(file, plain, direct)
    rename(temporary, file)


def put(out: Output, start: int, data: Tensor) -> None:
    """Write bytes (uint8) at `start`; whole pages past the cache where that can be.

    Raises:
        CheckpointError: the file cannot be written.
    """
    view = data.numpy().data
    head = -start % PAGE
    body = (len(view) - head) // PAGE * PAGE
    if (
        body > 0
        and (data.data_ptr() + head) % PAGE == 0
        and _put_direct(out, view[head : head + body], start + head)
    ):
        write(out.file, out.plain, view[:head], start)
        write(out.file, out.plain, view[head + body :], start + head + body)
    else:
        write(out.file, out.plain, view, start)


def _put_direct(out: Output, view: memoryview, start: int) -> bool:
    """Whether whole pages were written past the cache; some file systems are opened so and refuse it then."""
    if out.direct is None:
        return False
    try:
        taken = os.pwrite(out.direct, view, start)
    except OSError as error:
        if error.errno in REFUSED:
            out.direct = None
        return False  # written through the cache, which says what is the matter
    write(out.file, out.plain, view[taken:], start + taken)
    return True


@contextmanager
def past_cache(file: Path) -> Iterator[int | None]:
    """The descriptor of an existing file for writes past the cache; None where the file system has none."""
    try:
        descriptor = os.open(file, os.O_WRONLY | DIRECT) if DIRECT else None
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def reserve(out: Output, nbytes: int) -> None:
    """Give the file its size; on a real disk its blocks too, so that a full one says so before anything is written.

    Raises:
        CheckpointError: there is no room for it.
    """
    with writing(out.file):
        os.ftruncate(out.plain, nbytes)
        if out.direct is not None and nbytes and not out.shares:
            os.posix_fallocate(out.plain, 0, nbytes)


def sharing(out: Output, source: Path) -> bool:
    """Whether the file system lets the file share pages with `source`, which is tried with the first."""
    out.shares = sys.platform == "linux"
    out.shares = share(out, source, 0, 0, PAGE)
    return out.shares


def share(out: Output, source: Path, begin: int, start: int, nbytes: int) -> bool:
    """Let the pages from `start` on be those of `source` from `begin` on, copied by neither; whether that was done."""
    if not out.shares or nbytes <= 0 or begin % PAGE or start % PAGE or nbytes % PAGE:
        return False
    import fcntl

    try:
        with source.open("rb") as there:
            asked = struct.pack("qQQQ", there.fileno(), begin, nbytes, start)
            fcntl.ioctl(out.plain, FICLONERANGE, asked)
    except OSError:
        return False
    return True
