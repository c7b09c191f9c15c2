"""An image file's bytes: proof that they decode, and their exact and perceptual identity.

Only a full decode shows a truncated file (opening reads the header alone), and only an explicit list of formats keeps
Pillow's rarer parsers, with their history of holes, away from downloaded files. An image with too many pixels is
refused before it is decoded, by Pillow's own limit, which elsewhere is only a warning.
"""

import hashlib
import warnings
from dataclasses import dataclass
from io import BytesIO

import imagehash
from PIL import Image

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
HASH_SIDE = 16  # 16 x 16 brightness differences: 256 bits


class BadImageError(ValueError):
    """The bytes are not an image that decodes; the message says why."""


@dataclass(frozen=True)
class ImageFile:
    """One image as it goes into a row, with its size in pixels and both identities in hexadecimal digits."""

    data: bytes
    sha256: str  # 64 digits
    phash: str  # 64 digits: the 256-bit difference hash
    width: int
    height: int


def read_image(data: bytes) -> ImageFile:
    """Decode `data` completely and identify it.

    Raises BadImageError for bytes of no known format, truncated files and decompression bombs.
    """
    image = decode(data)
    phash = str(imagehash.dhash(image, hash_size=HASH_SIDE))
    return ImageFile(data, hashlib.sha256(data).hexdigest(), phash, image.width, image.height)


def decode(data: bytes) -> Image.Image:
    """The decoded image (its first frame); BadImageError in every way that this can fail."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?)") from error
    except (OSError, SyntaxError, ValueError) as error:  # PNG's parser raises SyntaxError for broken chunks
        raise BadImageError(str(error)) from error
    return image
