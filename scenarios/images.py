"""Pictures in a folder or in a zip: named by records we do not trust, checked when loaded, opened when needed.

A record's name may not leave its root: no `..`, no absolute path, no drive, no symlink that leads out. Backslashes, as
in files written on Windows, separate folders.
"""

import io
import os
import re
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from fedstrata.core.errors import BadInput

MOST_PIXELS = 64_000_000  # an 8000 x 8000 picture; more is a mistake or a decompression bomb
MOST_BYTES = 256_000_000
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # pictures; Pillow's others run programs
_UNSAFE = re.compile("[\0\ud800-\udfff]")  # NUL, halves of surrogate pairs


@dataclass(frozen=True)
class ImageFile:
    """The picture `name` under the folder `root`."""

    root: str
    name: str

    def key(self) -> str:
        return f"{self.root}/{self.name}"

    def open(self) -> Image.Image:
        """RGB. Raises `BadInput` when it is gone, left its root, is no image or too large."""
        path = Path(self.root, self.name)
        if not _inside(os.path.realpath(path), self.root):  # it may have been swapped since it was loaded
            raise BadInput(f"{path}: image must lie inside {self.root}")
        try:
            refuse_large(self.key(), path.stat().st_size)
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: not a readable image file: {error.strerror}") from error
        return decode(data, self.key())


@dataclass(frozen=True)
class ZipMember:
    """The picture `name` (as the records write it), stored as `member` of the zip file `archive`."""

    archive: str
    name: str
    member: str

    def key(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self) -> Image.Image:
        """RGB. Raises `BadInput` when the archive is gone or damaged, or the member is no image or too large."""
        try:
            archive = _archive(self.archive)
            refuse_large(self.key(), archive.getinfo(self.member).file_size)
            data = archive.read(self.member)
        except BadInput:
            raise
        except Exception as error:  # zipfile, zlib, bz2 and lzma have an error class each
            raise BadInput(f"{self.key()}: not a readable member of the zip file: {error}") from error
        return decode(data, self.key())


class FolderImages:
    """The pictures under a folder. Raises `BadInput` when there is no such folder."""

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise BadInput(f"{root}: no such image folder")
        self.root = os.path.realpath(root)
        self._parents: dict[str, bool] = {}  # folder → lies inside the root; a million rows share few folders

    def source(self, name: str, where: str = "image") -> ImageFile:
        """Raises `BadInput` that begins with `where` (file and record) when `name` leaves the folder."""
        safe = safe_name(name, where)
        if not self._stays(safe):
            raise BadInput(f"{where}: image must lie inside {self.root}, got {name!r}, a link that leads out of it")
        return ImageFile(self.root, safe)

    def has(self, source: ImageFile | ZipMember) -> bool:
        try:
            return Path(self.root, source.name).is_file()
        except (OSError, ValueError):
            return False

    def _stays(self, safe: str) -> bool:
        path = Path(self.root, safe)
        parent = str(path.parent)
        try:
            if parent not in self._parents:
                self._parents[parent] = _inside(os.path.realpath(parent), self.root)
            return self._parents[parent] and (not path.is_symlink() or _inside(os.path.realpath(path), self.root))
        except (OSError, ValueError):
            return True  # unreadable or not a file name at all: `has` reports it as missing


class ZipImages:
    """The pictures of a zip file. Raises `BadInput` when it cannot be read."""

    def __init__(self, path: str | Path) -> None:
        self.root = os.path.realpath(path)
        try:
            names = _archive(self.root).namelist()
        except FileNotFoundError:
            raise BadInput(f"{path}: no such zip file of images") from None
        except Exception as error:  # a damaged directory raises more than BadZipFile
            raise BadInput(f"{path}: not a readable zip file: {error}") from error
        files = [name for name in names if not name.endswith(("/", "\\"))]
        self._members = {str(PurePosixPath(name.replace("\\", "/"))): name for name in files}

    def source(self, name: str, where: str = "image") -> ZipMember:
        """Raises `BadInput` that begins with `where` (file and record) when `name` is no plain relative path."""
        safe = safe_name(name, where)
        return ZipMember(self.root, safe, self._members.get(safe, safe))

    def has(self, source: ImageFile | ZipMember) -> bool:
        return source.name in self._members


def open_images(path: str | Path) -> FolderImages | ZipImages:
    """A folder, or a file whose name ends with .zip. Raises `BadInput` when it cannot be read."""
    try:
        return ZipImages(path) if str(path).lower().endswith(".zip") and not Path(path).is_dir() else FolderImages(path)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise BadInput(f"{path}: not a readable folder or zip file: {getattr(error, 'strerror', error)}") from error


def safe_name(name: str, where: str) -> str:
    """`name` with forward slashes, without a leading `./` or doubled ones.

    Raises:
        BadInput: it could lead out of its root. Begins with `where`.

    >>> safe_name("./images//1.png", "train.json: record 1")
    'images/1.png'
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    drive = len(name) > 1 and name[1] == ":"
    if drive or pure.is_absolute() or ".." in pure.parts or not pure.parts or _UNSAFE.search(name):
        rule = "image must be a relative path that stays inside the images folder"
        raise BadInput(f"{where}: {rule}, got {name[:100]!r}")
    return str(pure)


def _archive(path: str) -> zipfile.ZipFile:
    """One open handle per archive and process: reading the directory anew takes longer than the picture."""
    return _handle(path, os.getpid(), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _handle(path: str, process: int, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def refuse_large(key: str, size: int) -> None:
    """Raises `BadInput`, beginning with `key`, for more than `MOST_BYTES`."""
    if size > MOST_BYTES:
        raise BadInput(f"{key}: image must have at most {MOST_BYTES:,} bytes, got {size:,}")


def decode(data: bytes, key: str) -> Image.Image:
    """RGB, from an image file's bytes. Raises `BadInput`, beginning with `key`, for what is no image or too large."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise BadInput(f"{key}: image must have at most {MOST_PIXELS:,} pixels, got {width} x {height}")
            return image.convert("RGB")
    except BadInput:
        raise
    except Exception as error:  # a decoder fed with hostile bytes raises almost anything
        raise BadInput(f"{key}: not a readable image: {error}") from error
