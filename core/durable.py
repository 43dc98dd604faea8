"""Files that are whole or not at all, also after a power cut: write, flush to the disk, rename, flush the folder.

The four steps are functions of their own, so that tests can break off between any two of them.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO

STORAGE = {  # what a disk or a folder may refuse with; anything else is a bug
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ENODEV")
}


def write_atomic(path: Path, *data: bytes, flush: bool = True) -> None:
    """Readers see the old file or the whole new one, all parts of it; flush: also after a power cut.

    Raises:
        OSError: the old file stands, and nothing half-written is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in data:
                put(file, part)
            if flush:
                sync_file(file)
        rename(temporary, path)
        if flush:
            sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put(file: BinaryIO, data: bytes) -> None:
    """Hands the data to the system."""
    file.write(data)
    file.flush()


def sync_file(file: BinaryIO) -> None:
    """Returns when the file's data are on the disk."""
    os.fsync(file.fileno())


def rename(temporary: Path, path: Path) -> None:
    """The new file takes the old one's name."""
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Returns when renames and removals in the folder are on the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_folder(folder: Path) -> None:
    """The folder is there, and stays there after a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """The file is gone for readers; after a power cut only once its folder was flushed."""
    path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes what killed writers left unfinished."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
