"""Pictures are found when loaded, opened when needed, and never read from outside their root."""

import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fedstrata.core.errors import BadInput
from fedstrata.scenarios import images
from fedstrata.scenarios.images import FolderImages, ZipImages, open_images


def png(colour: tuple[int, ...] = (255, 0, 0), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (4, 3), colour if mode == "RGB" else 128).save(data, "PNG")
    return data.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims to be side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        "a/1.png": png(),
        "grey.png": png(mode="L"),
        "text.png": b"no image at all",
        "empty.png": b"",
        "cut.png": png()[:40],
        "bomb.png": bomb(9000),
        "huge.png": bomb(60000),
    }


@pytest.fixture(params=["folder", "zip"])
def store(request: pytest.FixtureRequest, tmp_path: Path, files: dict[str, bytes]) -> FolderImages | ZipImages:
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return ZipImages(tmp_path / "images.zip")
    for name, data in files.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return FolderImages(tmp_path / "images")


def test_a_picture_opens_as_rgb_even_after_pickling(store: FolderImages | ZipImages) -> None:
    for name in ("a/1.png", "grey.png"):
        source = pickle.loads(pickle.dumps(store.source(name)))
        picture = source.open()
        assert (picture.mode, picture.size) == ("RGB", (4, 3))
        assert source == store.source(name)
        assert source.key().endswith(name)


@pytest.mark.parametrize("name", ["./a/1.png", "a//1.png", "a/./1.png", "a\\1.png", ".\\a\\1.png"])
def test_spellings_of_one_name_are_one_picture(store: FolderImages | ZipImages, name: str) -> None:
    assert store.source(name) == store.source("a/1.png")
    assert store.has(store.source(name))


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "a/../../x.png",
        "/etc/passwd",
        "\\\\server\\1.png",
        "a\\..\\..\\x.png",
        "C:\\x.png",
        "..",
        ".",
        "",
        "C:/x.png",
        "a\0.png",
        "..\\x.png",
        "\ud800.png",
    ],
)
def test_a_name_that_could_leave_the_root_is_refused(store: FolderImages | ZipImages, name: str) -> None:
    with pytest.raises(BadInput, match=r"^train.json: record 7: image must be a relative path .* got '"):
        store.source(name, "train.json: record 7")


@pytest.mark.parametrize("name", ["nowhere.png", "a", "a/1.png/x", "x" * 5000])
def test_what_is_not_there_is_missing(store: FolderImages | ZipImages, name: str) -> None:
    source = store.source(name)
    assert not store.has(source)
    with pytest.raises(BadInput, match=r"image|zip"):
        source.open()


@pytest.mark.parametrize("name", ["text.png", "empty.png", "cut.png"])
def test_what_is_no_image_is_refused_when_opened(store: FolderImages | ZipImages, name: str) -> None:
    with pytest.raises(BadInput, match=f"{name}: not a readable image"):
        store.source(name).open()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(store: FolderImages | ZipImages) -> None:
    with pytest.raises(BadInput, match=r"bomb.png: image must have at most 64,000,000 pixels, got 9000 x 9000"):
        store.source("bomb.png").open()
    with pytest.raises(BadInput, match=r"huge.png: not a readable image"):
        store.source("huge.png").open()


def test_files_that_are_too_long_are_not_read(store: FolderImages | ZipImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", 20)
    with pytest.raises(BadInput, match="at most 20 bytes"):
        store.source("a/1.png").open()


def test_links_may_stay_inside_but_not_lead_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "images", tmp_path / "secret"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "a/1.png").write_bytes(png())
    (outside / "2.png").write_bytes(png())
    (root / "inner.png").symlink_to(root / "a/1.png")
    (root / "file.png").symlink_to(outside / "2.png")
    (root / "folder").symlink_to(outside)
    store = FolderImages(root)
    assert store.source("inner.png").open().size == (4, 3)
    for name in ("file.png", "folder/2.png"):
        with pytest.raises(BadInput, match=r"record 1: image must lie inside .*a link that leads out"):
            store.source(name, "x.json: record 1")


def test_a_picture_swapped_for_a_link_after_loading_is_not_read(tmp_path: Path) -> None:
    root, secret = tmp_path / "images", tmp_path / "secret.png"
    root.mkdir()
    (root / "1.png").write_bytes(png())
    secret.write_bytes(png())
    source = FolderImages(root).source("1.png")
    (root / "1.png").unlink()
    (root / "1.png").symlink_to(secret)
    with pytest.raises(BadInput, match="must lie inside"):
        source.open()


def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    for name in ("images", "images2"):
        (tmp_path / name).mkdir()
    (tmp_path / "images2/1.png").write_bytes(png())
    (tmp_path / "images/1.png").symlink_to(tmp_path / "images2/1.png")
    with pytest.raises(BadInput, match="must lie inside"):
        FolderImages(tmp_path / "images").source("1.png")


def test_the_store_itself_must_be_there_and_whole(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not really")
    for name, message in (("gone", "no such image folder"), ("gone.zip", "no such zip"), ("bad.zip", "readable zip")):
        with pytest.raises(BadInput, match=f"{name}: .*{message}"):
            open_images(tmp_path / name)
    (tmp_path / "folder.zip").mkdir()
    assert isinstance(open_images(tmp_path / "folder.zip"), FolderImages)


def test_a_zip_from_windows_has_backslashes_in_its_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a\\1.png", png())
    store = ZipImages(tmp_path / "images.zip")
    assert store.has(store.source("a/1.png"))
    assert store.source("a\\1.png").open().size == (4, 3)


def test_a_damaged_or_replaced_zip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./1.png", png())
    source = ZipImages(path).source("1.png")
    assert source.open().getpixel((0, 0)) == (255, 0, 0)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadInput, match=r"images.zip/1.png: not a readable member"):
        source.open()
