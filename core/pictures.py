"""Pictures: every stage opens them here, so that all see the same pixels, and none from a URL."""

import contextlib
import functools
import io
import os
from pathlib import Path

import numpy as np

from core.files import InputError

MAX_PIXELS = 64 * 2**20  # of a picture, by its header: it would take 200 MB and more
MAX_RATIO = 200  # longer side to shorter side; Qwen's models take no other
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright


class BadPicture(InputError):
    """A picture that cannot be used, with the reason."""

    def __init__(self, reason, picture=None):
        name = "a picture" if picture is None or isinstance(picture, bytes) else picture
        super().__init__(
            f"an image cannot be read: {str(name)[-200:]} ({reason}); restore or replace it, or "
            "remove its row"
        )
        self.reason = reason


def open_picture(picture):
    """A path or bytes as a PIL image: upright, RGB, on white where it is transparent."""
    with opened(picture) as image:
        return upright_rgb(image)


@contextlib.contextmanager
def opened(picture):
    """
    The PIL image of a path or of bytes, of which only the header was read; BadPicture if it cannot
    be used. A picture is a file: no URL, no device, no pipe.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # check_header() is stricter: PIL's own limit first only warns
    if isinstance(picture, str) and "://" in picture:
        raise BadPicture("picture is a URL", picture)
    is_bytes = isinstance(picture, bytes)
    if picture is None or not (is_bytes or os.path.isfile(picture)):
        raise BadPicture("missing image", picture)
    try:
        with Image.open(io.BytesIO(picture) if is_bytes else picture) as image:
            check_header(image, picture)
            yield image
    except BadPicture:
        raise
    except Exception:  # what a damaged file raises is up to the decoder: OSError, SyntaxError, ...
        raise BadPicture("unreadable image", picture) from None


def check_header(image, picture):
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPicture(f"picture above {MAX_PIXELS / 2**20:.0f} megapixels", picture)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadPicture(f"one side is over {MAX_RATIO} times the other", picture)


def is_plain(image):
    """Whether whoever opens this file sees what upright_rgb() makes of it."""
    from PIL import Image

    exif = Image.Image.getexif(image)  # of its header; a PNG's own method decodes all of it
    is_upright = exif.get(ORIENTATION, 1) == 1
    return is_upright and image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data


def upright_rgb(image):
    """The picture as every model is shown it; transparency becomes white, as in qwen-vl-utils."""
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.new("RGB", coloured.size, "white")
        image.paste(coloured, mask=coloured.getchannel("A"))
    return image.convert("RGB")  # decodes all of it: only so a file that was cut off is found


def eight_bits(image):
    """Grey values up to 65535 as grey values up to 255; PIL would make white of all above 255."""
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BadPicture("grey values outside of 0 to 65535")
    is_deep = image.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values / 257 if is_deep else values).round().astype("uint8"))


# --------------------------------------------------------------------------------------------------
# Which pictures may be sent to a server


def add_media_root_flag(add):
    add(
        "--media_root",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="pictures in these folders may be sent to the server as well; without it only those "
        "in the folders of the data and in --out",
    )


def check_may_be_sent(records, data, args):
    """
    Stops before a stranger's file makes a stage send other pictures of this disk: each picture of
    the pairs, rows or tasks is in the folder of a path of `data`, in --out or a --media_root.
    """
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in data]
    allowed = [Path(os.path.realpath(path)) for path in (*folders, args.out, *args.media_root)]
    for record in records:
        for picture in record.images + (record.video or []):
            where = real_path(picture)
            if not any(where.is_relative_to(folder) for folder in allowed):
                raise InputError(
                    f"{record.id[:60]!r} has the picture {str(where)[-160:]!r}, outside of the "
                    "data's folder; it is sent to a server only if you name a folder that holds "
                    "it: --media_root FOLDER"
                )


def real_path(path):
    """Without symbolic links and "..": a path that looks as if it were inside may lead outside."""
    if os.path.islink(path):
        return Path(os.path.realpath(path))
    folder, name = os.path.split(path)
    return real_folder(folder) / name


@functools.lru_cache(10_000)
def real_folder(folder):
    return Path(os.path.realpath(folder))
