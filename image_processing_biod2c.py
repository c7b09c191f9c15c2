"""Images to `pixel_values`: squashed to a square, bicubic, normalised (paper: PMC-CLIP's input at 512 pixels).

Unusual here: Pillow and NumPy only, no torchvision; no crop, since what is at a border may be what is asked about;
whatever comes in becomes 8-bit RGB first, so that a file, its PIL image and its array give the same values; deep greys,
which Pillow would clip to white, are scaled down; and an image that cannot be read raises a ValueError that names the
file, so that a long job can record it and go on.
"""

import base64
import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_channel_dimension_format
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    load_image,
    make_flat_list_of_images,
)
from transformers.utils import is_torch_tensor

# Pillow knows more, some of which start other programs
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM")
# What Pillow raises for broken files, found by changing bytes of good ones
DAMAGE = (OSError, SyntaxError, ValueError)


class BioD2CImageProcessor(PilBackend):
    """Paths, URLs, base64 text, PIL images, NumPy arrays or tensors -> `pixel_values` [I, 3, H, W], float32.

    The defaults are PMC-CLIP's: 512 x 512 without keeping the aspect ratio, CLIP's mean and standard deviation. The
    authors' checkpoint wants ImageNet's mean and standard deviation; its converted folder says so.

    Arrays are [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, and hold 0 to 255, or, as floats, 0 to 1; see
    `eight_bit` for deeper ones. With `do_rescale=False` they are taken as they are.

    Raises:
        ValueError: for an image that cannot be decoded, is truncated, empty or a decompression bomb, and for anything
            that is no image.
    """

    do_resize = True
    size = {"height": 512, "width": 512}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """PIL images of what is given as text or path, arrays of tensors; nested lists keep their form."""
        image = image_url_or_urls
        if isinstance(image, (list, tuple)):
            return [self.fetch_images(one) for one in image]
        if isinstance(image, (str, os.PathLike)):
            return open_image(image)
        if is_torch_tensor(image):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise ValueError(f"expected an image (path, URL, PIL image, array or tensor), got {type(image).__name__}")
        return image[..., None] if isinstance(image, np.ndarray) and image.ndim == 2 else image

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        flat = make_flat_list_of_images(self.fetch_images(images))
        if not flat:
            raise ValueError("expected at least one image, got none")
        for number, image in enumerate(flat):
            if isinstance(image, Image.Image):
                flat[number] = upright_rgb(image)
            elif kwargs.get("do_rescale", self.do_rescale):
                flat[number] = upright_rgb(from_array(image, kwargs.get("input_data_format")))
        return super().preprocess(flat, *args, **kwargs)


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Open and decode an image whole: a file, its bytes, an http(s):// or data:image/ address, or base64 text.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if isinstance(source, bytes):
        return _decode(BytesIO(source), "image")
    name = str(source)
    if os.path.isfile(source):
        return _decode(source, name)
    if name.startswith(("http://", "https://")):
        return load_image(name)
    short = name if len(name) < 300 else f"{name[:40]}..."
    try:
        return _decode(BytesIO(base64.b64decode(name.rpartition("base64,")[2], validate=True)), short)
    except ValueError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, UnidentifiedImageError):
            raise  # an image, but a damaged one
        expected = "a path, an http(s):// or data:image/ address, or base64 text is expected"
        raise ValueError(f"{short}: no such image file ({expected})") from error


def _decode(file: str | os.PathLike | BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; shrink the image first") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that can be read here; convert it to PNG or JPEG") from error
    except DAMAGE as error:
        raise ValueError(f"{name}: the image is damaged or cut off ({error})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF orientation says; deep greys as `eight_bit` has it, transparency over white.

    Raises:
        ValueError: for an image without pixels, or one that was opened and turns out damaged.
    """
    name = getattr(image, "filename", "") or "image"
    if 0 in image.size:
        raise ValueError(f"{name}: has no pixels, its size is {image.size}")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return Image.fromarray(eight_bit(np.asarray(image))).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except DAMAGE as error:
        raise ValueError(f"{name}: damaged or cut off ({error})") from error


def from_array(array: np.ndarray, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """[H, W, C] or [C, H, W] with 1, 3 or 4 channels -> PIL image.

    Raises:
        ValueError: for another shape, naming it.
    """
    if array.ndim != 3 or not {1, 3, 4} & {array.shape[0], array.shape[-1]}:
        raise ValueError(
            f"an array has shape {array.shape}: expected [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4"
        )
    source = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    array = to_channel_dimension_format(array, ChannelDimension.LAST, source)
    return Image.fromarray(eight_bit(array.squeeze(-1) if array.shape[-1] == 1 else array))


def eight_bit(values: np.ndarray) -> np.ndarray:
    """Pixels [H, W] or [H, W, C] of any type as uint8.

    16-bit: white is 4095 where no pixel is above it (12-bit scanners), else 65535. Floats from 0 to 1 are stretched to
    255, and what lies within 0 to 255 stays. Any other grey has no agreed white (CT numbers, say): its own range is
    stretched.

    Raises:
        ValueError: for colours out of range.
    """
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    finite = values[np.isfinite(values)]
    black, white = (finite.min(), finite.max()) if finite.size else (0, 0)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        black, white = 0, 4095 if white <= 4095 else 65535
    elif values.dtype == bool or (values.dtype.kind == "f" and black >= 0 and white <= 1):
        black, white = 0, 1
    elif black >= 0 and white <= 255:
        black, white = 0, 255
    elif values.ndim == 3:
        raise ValueError(f"an array's colours go from {black:g} to {white:g}: expected 0 to 255, or 0 to 1")
    scaled = (values.astype(np.float64) - float(black)) / max(float(white) - float(black), 1e-12)
    return np.round(np.clip(np.nan_to_num(scaled), 0, 1) * 255).astype(np.uint8)


BioD2CImageProcessor.register_for_auto_class()

__all__ = ["BioD2CImageProcessor"]
