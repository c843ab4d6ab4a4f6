"""core/pictures.py: one picture for training, vLLM and servers; what is refused, what is sent."""

import base64
import io
import os
import struct
import zlib
from argparse import Namespace

import numpy as np
import pytest
from conftest import png
from PIL import Image

from core.endpoint import data_url
from core.files import InputError
from core.pairs import Pair
from core.pictures import MAX_PIXELS, BadPicture, check_may_be_sent, open_picture
from sources.reading import check_picture

GREY = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype("uint16")


def pixels(picture):
    return np.asarray(open_picture(picture))


def sent(path):
    """The pixels of what a server gets."""
    data = base64.b64decode(data_url(path, 2**30).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def turned_jpeg(path):
    image = Image.fromarray(np.repeat(np.arange(48, dtype="uint8")[None] * 5, 16, 0)).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif, quality=100)


def test_sixteen_bits_are_scaled_not_cut_to_white(tmp_path):
    path = str(tmp_path / "grey.png")
    Image.fromarray(GREY).save(path)
    assert Image.open(path).mode == "I;16"
    expected = np.repeat((GREY / 257).round()[..., None], 3, axis=2)
    assert (pixels(path) == expected).all()
    assert abs(sent(path) - expected).max() < 8  # a JPEG
    Image.fromarray(GREY.astype("int32")).save(tmp_path / "grey.tiff")
    assert (pixels(str(tmp_path / "grey.tiff")) == expected).all()


def test_a_turned_photograph_is_upright_everywhere(tmp_path):
    path = str(tmp_path / "turned.jpg")
    turned_jpeg(path)
    seen = pixels(path)
    assert seen.shape == (48, 16, 3)
    assert abs(sent(path) - seen).max() < 8
    plain = str(tmp_path / "plain.png")
    Image.fromarray(seen).save(plain)
    assert check_picture(path)[0] == check_picture(plain)[0]


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    image.convert("LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (8, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear.png", "grey.png", "palette.png"):
        assert (pixels(str(tmp_path / name)) == 255).all(), name
        assert (sent(str(tmp_path / name)) > 250).all(), name


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_kinds_are_what_pil_makes_of_them(tmp_path, mode):
    path = str(tmp_path / "picture.tiff")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype("uint8")
    Image.fromarray(noise).convert(mode).save(path)
    assert (pixels(path) == np.asarray(Image.open(path).convert("RGB"))).all()


def png_header(width, height):
    """A PNG of a few bytes that claims any size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    "picture, reason",
    [
        ("http://127.0.0.1:9/a.png", "picture is a URL"),
        ("file:///etc/passwd", "picture is a URL"),
        ("/dev/zero", "missing image"),
        ("/etc/passwd", "unreadable image"),
        (png((64, 64), kind="JPEG")[:-200], "unreadable image"),
        (png_header(2**14, MAX_PIXELS // 2**14 + 1), "picture above 64 megapixels"),
        (png_header(50_000, 50_000), "picture above 64 megapixels"),
        (png((201, 1)), "one side is over 200 times the other"),
    ],
)
def test_what_is_refused_before_it_is_decoded(picture, reason):
    with pytest.raises(BadPicture) as error:
        open_picture(picture)
    assert error.value.reason == reason and len(str(error.value)) < 400


def test_a_plain_picture_is_sent_without_being_decoded(tmp_path):
    whole = png((64, 64))
    (tmp_path / "cut.png").write_bytes(whole[:-30])  # only a decoder notices
    assert (
        base64.b64decode(data_url(str(tmp_path / "cut.png"), 2**30).partition(",")[2])
        == whole[:-30]
    )


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadPicture, match="missing image"):
        open_picture(str(tmp_path / "pipe.png"))


# --- what may be sent


def test_only_pictures_of_the_data_are_sent_to_a_server(tmp_path):
    for folder in ("data/images", "out", "home", "more"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(png())
    os.symlink(tmp_path / "home/a.png", tmp_path / "data/link.png")
    os.symlink(tmp_path / "home", tmp_path / "data/folder")
    args = Namespace(out=str(tmp_path / "out"), media_root=[str(tmp_path / "more")])
    data = [str(tmp_path / "data/pairs.jsonl")]

    def check(path):
        pair = Pair("x", "toy", "Q", [str(tmp_path / path)], None, ["a", "b"], 1)
        check_may_be_sent([pair], data, args)

    for path in ("data/images/a.png", "data/../out/a.png", "more/a.png", "data/images/../a.png"):
        check(path)
    for path in ("home/a.png", "data/../home/a.png", "data/link.png", "data/folder/a.png"):
        with pytest.raises(InputError, match=r"'x' has the picture .*home/a\.png.*--media_root"):
            check(path)
