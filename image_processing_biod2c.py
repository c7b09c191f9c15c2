"""Images to `pixel_values`: squashed to a square, bicubic, normalised (paper: PMC-CLIP's input at 512 pixels).

Unusual here: Pillow and NumPy only, no torchvision; no crop, since what is at a border may be what is asked about; 16-bit and
floating-point greys, which Pillow would clip to white, are scaled down; and an image that cannot be read raises a ValueError
that names the file, so that a long job can record it and go on.
"""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, load_image


class BioD2CImageProcessor(PilBackend):
    """PIL images, NumPy arrays, tensors, paths, URLs or base64 strings -> `pixel_values` [I, 3, H, W], float32.

    The defaults are PMC-CLIP's: 512 x 512 without keeping the aspect ratio, CLIP's mean and standard deviation. The authors'
    checkpoint wants ImageNet's mean and standard deviation; its converted folder says so.

    Raises:
        ValueError: for an image that cannot be decoded, is truncated or is a decompression bomb.
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
        """Open what is given as a path; nested lists keep their form."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)) and os.path.isfile(image_url_or_urls):
            return open_image(image_url_or_urls)
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://", "data:image/")):
            return load_image(image_url_or_urls)
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            raise ValueError(
                f"{image_url_or_urls}: no such image file (a path, http(s):// or data:image/ address is expected)"
            )
        return image_url_or_urls

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        return super().preprocess(self.fetch_images(images), *args, **kwargs)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(image, Image.Image):
            image = upright_rgb(image)
        return super().process_image(image, *args, **kwargs)


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open and decode an image file whole.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that Pillow can read; convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; shrink the image first") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ValueError(f"{path}: the image is damaged or cut off ({error})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF orientation says; deep greys scaled to 8 bits, transparency over white.

    16-bit greys: white is 4095 where no pixel is above it (12-bit scanners), else 65535. 32-bit integers and floats have no
    agreed white: their own range is stretched.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _eight_bit(image).convert("RGB")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{getattr(image, 'filename', '') or 'image'}: damaged or cut off ({error})") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode in ("I", "F"):
        black, white = values.min(), values.max()
    else:
        black, white = 0.0, 4095.0 if values.max() <= 4095 else 65535.0
    scaled = (values - black) / max(white - black, 1e-12)
    return Image.fromarray(np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8))


BioD2CImageProcessor.register_for_auto_class()

__all__ = ["BioD2CImageProcessor"]
