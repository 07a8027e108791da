"""What writing goes through: files and directories that are whole or absent, and on the disk when it is said.

Everything here changes the disk by functions of `os`, one at a time, so that a test can stop the process at each.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftsurgery.errors import CheckpointError, DiskError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_DISK = "the checkpoint is on another file system"
FICLONE = 0x40049409
"""Linux's request to share a file's blocks (ioctl_ficlone(2))."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out` when the block ends well and vanishes when it does not.

    It is a hidden sibling of `out`, flushed to the disk and renamed in one step; whatever goes wrong,
    Ctrl-C included, `out` and the directories above it are as they were.

    Raises:
        CheckpointError: `out` is not a new or empty directory (before the block runs), or cannot be written.
    """
    final = out.expanduser().resolve()
    check_free(final, out)
    temporary = final.with_name(f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    made = [parent for parent in final.parents if not parent.exists()]
    try:
        with writing(temporary):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(out):
            flush(temporary)
            temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise
    with writing(out):
        sync_directory(final.parent)


@contextmanager
def added(directory: Path, *names: str) -> Iterator[tuple[Path, ...]]:
    """Hidden files to write in an existing directory, which get their names when the block ends well.

    No other file of the directory is opened, and what goes wrong leaves none of them.
    """
    mark = f"partial-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = tuple(directory / f".{name}.{mark}" for name in names)
    try:
        yield temporary
        with writing(directory):
            for file in temporary:
                sync(file)
            for file, name in zip(temporary, names, strict=True):
                file.replace(directory / name)
            sync_directory(directory)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def write_json(file: Path, value: object) -> None:
    """Write `value` as readable JSON, in the order it has; a file of that name is replaced in one step.

    Raises:
        CheckpointError: the file cannot be written.
    """
    replace(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def replace(file: Path, data: bytes) -> None:
    """Make `data` what `file` holds, in one step: it holds what it held, or all of `data`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.partial")
    with writing(file):
        temporary.unlink(missing_ok=True)
    try:
        with opened(temporary, new=True) as descriptor:
            put(file, descriptor, data, 0)
        rename(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put(file: Path, descriptor: int, data: bytes | memoryview, start: int) -> int:
    """Write all of `data` at the byte `start` of an open file, and say where it ends.

    Raises:
        CheckpointError: `file`, which names it in the message, cannot be written.
    """
    rest = memoryview(data)
    with writing(file):
        while rest:
            taken = os.pwrite(descriptor, rest, start)
            if not taken:
                raise OSError(errno.EIO, "the disk takes nothing")
            rest, start = rest[taken:], start + taken
    return start


@contextmanager
def opened(file: Path, *, new: bool = False, sync: bool = True) -> Iterator[int]:
    """The descriptor of a file to write in; what was written is on the disk when the block ends well, with `sync`.

    Raises:
        CheckpointError: the file cannot be written, or a `new` one exists.
    """
    with writing(file):
        descriptor = os.open(file, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new else 0), 0o666)
    try:
        yield descriptor
        if sync:
            with writing(file):
                os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(file: Path) -> None:
    """Bring what was written in a file to the disk.

    Raises:
        CheckpointError: the disk refuses.
    """
    with opened(file):
        pass


def discard(file: Path) -> None:
    """Remove a file where it is there, and bring that to the disk.

    Raises:
        CheckpointError: it cannot be removed.
    """
    with writing(file):
        file.unlink(missing_ok=True)
        sync_directory(file.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file another name in its directory, and bring that to the disk.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    with writing(target):
        os.rename(source, target)
        sync_directory(target.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy what `source` holds, or what it links to.

    Raises:
        CheckpointError: the file cannot be read or written.
    """
    with writing(target):
        shutil.copyfile(source, target)


def lend(source: Path, target: Path) -> tuple[str, str]:
    """`link`, or else a `copy`, and the reason for it."""
    how, why = link(source, target)
    if how:
        return how, ""
    copy_file(source, target)
    return "copy", why


def link(source: Path, target: Path) -> tuple[str, str]:
    """Let `target`, a new file, have the bytes of `source` without writing them.

    What comes back is how, and why not where it cannot be. A `reflink` is a file of its own; a `hard link` is the
    same file under a second name. A link of a cache is never hard-linked, for what it leads to is the cache's.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if _reflinked(source, target):
        return "reflink", ""
    if source.is_symlink():
        return "", f"{source.name} is a symbolic link, as in a cache"
    try:
        os.link(source, target)
    except OSError as error:
        return "", OTHER_DISK if error.errno == errno.EXDEV else error.strerror or str(error)
    return "hard link", ""


def _reflinked(source: Path, target: Path) -> bool:
    """Whether the file system made `target` share the blocks of `source`; if not, there is no `target`."""
    if sys.platform != "linux":
        return False
    import fcntl

    with writing(target):
        here = target.open("xb")
    try:
        with here, source.open("rb") as there:
            fcntl.ioctl(here.fileno(), FICLONE, there.fileno())
    except OSError:
        target.unlink()
        return False
    return True


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns what the operating system says into what the user can do about it."""
    try:
        yield
    except OSError as error:
        remedy = "Make room, or write elsewhere" if error.errno in FULL else "Check the path and its rights"
        raise DiskError(f"{file} cannot be written: {error.strerror or error}", remedy) from error


def check_free(final: Path, out: Path) -> None:
    """Refuse an output that holds something, or that a rename could not replace.

    Args:
        final: `out`, resolved.

    Raises:
        CheckpointError: it is not a new or empty directory.
    """
    if not final.exists():
        return
    if not final.is_dir():
        raise CheckpointError(
            f"{out} is a file. Name a directory that does not exist yet; nothing was written."
        )
    with writing(out):
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


def flush(directory: Path) -> None:
    """Bring every file and directory below to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder, name))
        sync_directory(Path(folder))


def sync(path: Path) -> None:
    with held(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def held(path: Path) -> Iterator[int]:
    """The descriptor of a file or directory, to read from or to lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        sync(path)


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove directories, the innermost first, as long as they hold nothing."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return
