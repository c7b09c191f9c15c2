"""What counts as an image, and its identities."""

import hashlib
import io

import pytest
from PIL import Image

from biod2c.dataset_builder.images import BadImageError, decode, read_image


def encoded(image, image_format):
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


def test_identities_of_an_image(make_jpeg):
    data = make_jpeg(3)
    image = read_image(data)
    assert (image.data, image.sha256) == (data, hashlib.sha256(data).hexdigest())
    assert (image.width, image.height) == (40, 30)
    assert len(image.phash) * 4 == 256


def test_the_perceptual_hash_outlives_re_encoding_and_tells_images_apart(examples):
    path, other = sorted((examples / "slake" / "imgs").glob("*/source.jpg"))[:2]
    original = read_image(path.read_bytes())
    copy = read_image(encoded(decode(original.data).resize((200, 200)), "PNG"))
    differing = [
        bin(int(original.phash, 16) ^ int(i.phash, 16)).count("1") for i in (copy, read_image(other.read_bytes()))
    ]
    assert copy.sha256 != original.sha256
    assert differing[0] <= 24 < differing[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_modes_of_medical_files_decode(mode):
    assert read_image(encoded(Image.new(mode, (20, 10)), "PNG")).width == 20


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_bytes_that_do_not_decode(make_jpeg, keep):
    with pytest.raises(BadImageError):
        decode(make_jpeg()[:keep])


def test_a_broken_png_chunk():
    data = bytearray(encoded(Image.new("RGB", (20, 10)), "PNG"))
    data[20] ^= 0xFF
    with pytest.raises(BadImageError):
        decode(bytes(data))


@pytest.mark.parametrize("limit", [100, 150])  # 200 pixels are an error above twice the limit, a warning above it
def test_a_decompression_bomb_is_an_error_of_its_own(monkeypatch, limit):
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit - 1)
    with pytest.raises(BadImageError, match="decompression bomb"):
        decode(data)


def test_formats_off_the_list_are_not_parsed():
    with pytest.raises(BadImageError, match="cannot identify"):
        decode(encoded(Image.new("RGB", (20, 10)), "PPM"))
