"""Every kind of image becomes the same 8-bit RGB pixels first; what Pillow's resize and plain arithmetic make of them
is given to the model; and what cannot be read is one ValueError that names it.
"""

import base64
import io
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from biod2c import BioD2CImageProcessor
from biod2c.image_processing_biod2c import FORMATS, eight_bit, open_image, upright_rgb

SIDE = 24


@pytest.fixture(scope="module")
def process():
    processor = BioD2CImageProcessor(size={"height": SIDE, "width": SIDE})

    def run(images, **kwargs):
        return processor(images, return_tensors="pt", **kwargs)["pixel_values"]

    return run


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def by_hand(image: Image.Image, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, side=SIDE) -> torch.Tensor:
    """Pillow's bicubic resize of an RGB image, then (x / 255 - mean) / std."""
    assert image.mode == "RGB"
    resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return torch.tensor((resized / 255 - mean) / std).permute(2, 0, 1).float()


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (1, 1), (SIDE, SIDE), (500, 3)])
def test_values_are_pillows_resize_then_normalised(process, make_image, size):
    image = make_image(size=size) if min(size) > 1 else Image.new("RGB", size, (10, 20, 30))
    output = process(image)
    assert output.shape == (1, 3, SIDE, SIDE)
    assert output.dtype == torch.float32
    close(output[0], by_hand(image))


def test_the_authors_normalisation(make_image):
    processor = BioD2CImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    output = processor(make_image(), return_tensors="pt")["pixel_values"]
    close(output[0], by_hand(make_image(), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, side=512))


def test_white_and_black(process):
    for colour, value in (("white", 1.0), ("black", 0.0)):
        wanted = (value - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
        close(process(Image.new("RGB", (9, 7), colour))[0], wanted[:, None, None].expand(3, SIDE, SIDE).contiguous())


# ------------------------------------------------------------------------------------------------------ kinds of input


def kinds(pixels: np.ndarray, folder: Path) -> dict:
    file = folder / "image.png"
    Image.fromarray(pixels).save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    chw, unit = pixels.transpose(2, 0, 1), pixels / 255
    tensor = torch.from_numpy(chw.copy())
    return {
        "str": str(file),
        "Path": file,
        "PIL": Image.fromarray(pixels),
        "PIL not yet read": Image.open(file),
        "data URL": f"data:image/png;base64,{text}",
        "base64": text,
        "uint8 HWC": pixels,
        "uint8 CHW": chw,
        "int64 HWC": pixels.astype(np.int64),
        "float of 255 HWC": pixels.astype(np.float32),
        "float of 1 HWC": unit,
        "float of 1 CHW": unit.astype(np.float32).transpose(2, 0, 1),
        "uint8 tensor": tensor,
        "int tensor": tensor.int(),
        "float tensor": tensor.float() / 255,
        "double tensor HWC": torch.from_numpy(unit),
        "tensor with a gradient": (tensor.float() / 255).requires_grad_(),
        "4-D array": pixels[None],
        "4-D tensor": tensor[None],
        "list": [pixels],
        "tuple": (tensor,),
        "nested list": [[Image.fromarray(pixels)]],
        "a list of paths": [file],
    }


def test_all_kinds_give_the_same(process, pixels, tmp_path):
    wanted = process(Image.fromarray(pixels))
    close(wanted[0], by_hand(Image.fromarray(pixels)))
    for name, image in kinds(pixels, tmp_path).items():
        assert torch.equal(process(image), wanted), name
        assert torch.equal(process([image, image] if not isinstance(image, (list, tuple)) else [*image, *image]),
                           wanted.expand(2, -1, -1, -1)), name  # fmt: skip


def test_bfloat16_tensor(process, pixels):
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1) / 255).bfloat16()  # 8 bits of mantissa: off by one now and then
    torch.testing.assert_close(process(tensor), process(pixels), atol=0.03, rtol=0)


def test_kinds_mix_in_a_batch(process, pixels, tmp_path):
    images = [image for image in kinds(pixels, tmp_path).values() if not isinstance(image, (list, tuple))]
    images = [image for image in images if getattr(image, "ndim", 3) == 3]
    output = process(images)
    assert (output == output[:1]).all()


def test_arrays_already_rescaled(process, pixels):
    """transformers' idiom for arrays from 0 to 1."""
    close(process(pixels / 255, do_rescale=False), process(pixels))
    close(process(torch.from_numpy(pixels / 255), do_rescale=False), process(pixels))


def test_channels_where_they_are_said_to_be(process):
    array = np.random.default_rng(1).integers(0, 256, (3, 20, 3), dtype=np.uint8)  # could be either
    last = process(array, input_data_format="channels_last")
    assert torch.equal(last, process(Image.fromarray(array)))
    assert torch.equal(process(array.transpose(2, 0, 1), input_data_format="channels_first"), last)


# --------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "RGBX", "I", "F"])
def test_modes_without_transparency(process, pixels, mode):
    """Pillow's own conversion to RGB; "I" and "F" from 0 to 255 are a grey image, which Pillow would convert so too."""
    image = Image.fromarray(pixels).convert(mode)
    grey = Image.fromarray(np.round(np.asarray(image)).astype(np.uint8)) if mode in "IF" else image
    close(process(image)[0], by_hand(grey.convert("RGB")))


def over_white(image: Image.Image) -> Image.Image:
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    return Image.fromarray(np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))


def transparent(pixels, mode) -> Image.Image:
    alpha = Image.fromarray(
        np.linspace(0, 255, pixels.shape[0] * pixels.shape[1]).reshape(pixels.shape[:2]).astype("u1")
    )
    image = Image.fromarray(pixels)
    if mode in ("P", "L", "RGB"):
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
        first = image.getpixel((0, 0))
        stream = io.BytesIO()
        image.save(stream, "PNG", transparency=first)
        return Image.open(stream)
    image = image.convert({"LA": "L", "PA": "P"}.get(mode, "RGB"))
    if mode == "RGBa":
        image.putalpha(alpha)
        return image.convert("RGBa")
    if mode == "PA":
        return image.convert("PA")
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P", "L", "RGB"])
def test_transparency_lies_over_white(process, pixels, mode):
    image = transparent(pixels, mode)
    assert image.mode == mode
    assert image.has_transparency_data
    torch.testing.assert_close(
        process(image)[0], by_hand(over_white(image)), atol=0.02, rtol=0
    )  # a rounding of one level
    if mode in ("P", "L", "RGB"):
        assert (np.asarray(upright_rgb(image))[0, 0] == 255).all()


def test_lab_has_no_alpha():
    """Its A is a colour."""
    image = Image.new("LAB", (4, 4), (0, 128, 128))
    assert np.asarray(upright_rgb(image)).max() == np.asarray(image.convert("RGB")).max() < 255


def test_rgba_array(process, pixels):
    rgba = np.concatenate([pixels, pixels[..., :1]], -1)
    assert torch.equal(process(rgba), process(Image.fromarray(rgba)))
    assert torch.equal(process(rgba.transpose(2, 0, 1)), process(Image.fromarray(rgba)))


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (1, 20, 30)], ids=str)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_grey_arrays(process, pixels, shape, kind):
    grey = np.ascontiguousarray(pixels[..., 0])
    wanted = process(Image.fromarray(grey))
    assert torch.equal(process(kind(grey.reshape(shape))), wanted)
    assert torch.equal(process([kind(grey.reshape(shape))] * 2)[1:], wanted)
    assert torch.equal(process(kind(grey.reshape(shape) / 255)), wanted)
    assert torch.equal(process(kind(grey.reshape(shape) > 100)), process(Image.fromarray(grey > 100)))


# ---------------------------------------------------------------------------------------------------------- deep greys


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
@pytest.mark.parametrize(("top", "white"), [(65535, 65535), (5000, 65535), (4095, 4095), (300, 4095)])
def test_sixteen_bits(process, mode, top, white):
    values = np.linspace(0, top, 600).round().reshape(20, 30)
    image = Image.frombytes(mode, (30, 20), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    wanted = Image.fromarray(np.round(values / white * 255).astype(np.uint8)).convert("RGB")
    close(process(image)[0], by_hand(wanted))
    assert torch.equal(process(np.asarray(image)), process(image))


def test_sixteen_bit_png_and_tiff(process, tmp_path):
    """The same picture in 8 and in 16 bits; Pillow alone would make nearly all of the second white."""
    grey = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    wanted = process(Image.fromarray(grey))
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.mode.startswith("I")
            assert np.asarray(image.convert("RGB")).mean() > 200
        assert torch.equal(process(tmp_path / name), wanted)
        assert torch.equal(process(Image.open(tmp_path / name)), wanted)


def test_ct_numbers_are_stretched(process):
    """Hounsfield units: negative, and with no agreed white."""
    values = np.linspace(-1024, 3071, 600).reshape(20, 30)
    wanted = Image.fromarray(np.round((values + 1024) / 4095 * 255).astype(np.uint8)).convert("RGB")
    for array in (values.astype(np.int16), values.astype(np.int32), values.astype(np.float32)):
        torch.testing.assert_close(process(array)[0], by_hand(wanted), atol=0.02, rtol=0)
    for mode, kind in (("I", np.int32), ("F", np.float32)):
        image = Image.fromarray(values.astype(kind))
        assert image.mode == mode
        torch.testing.assert_close(process(image)[0], by_hand(wanted), atol=0.02, rtol=0)


def test_what_is_not_a_number_is_the_darkest():
    values = np.array([[0.0, 0.5, 1.0], [np.nan, np.inf, -np.inf]], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert eight_bit(values)[0].tolist() == [0, 128, 255]
        assert eight_bit(values)[1, 0] == 0
        assert eight_bit(np.full((2, 2), np.nan)).tolist() == [[0, 0], [0, 0]]


def test_constant_images():
    assert eight_bit(np.full((2, 2), 7, dtype=np.int32)).tolist() == [[7, 7], [7, 7]]
    assert eight_bit(np.full((2, 2), 7000, dtype=np.int32)).tolist() == [[0, 0], [0, 0]]
    assert eight_bit(np.full((2, 2), -5.0)).tolist() == [[0, 0], [0, 0]]


# --------------------------------------------------------------------------------------------------------- orientation

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(pixels, tmp_path, file_format, orientation):
    if file_format == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"image.{file_format.lower()}"
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    if file_format == "JPEG":
        pixels = np.repeat(np.repeat(pixels, 8, 0), 8, 1)
        lossless = {"quality": 100, "subsampling": 0}
    Image.fromarray(pixels).save(file, file_format, exif=exif, **lossless)
    for image in (open_image(file), Image.open(file)):
        turned = np.asarray(upright_rgb(image)).astype(int)
        assert turned.shape == TURNS[orientation](pixels).shape
        assert np.abs(turned - TURNS[orientation](pixels)).max() <= (12 if file_format == "JPEG" else 0)


# -------------------------------------------------------------------------------------------------------------- errors


def encoded(file_format: str, size=(60, 40), mode="RGB", **kwargs) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, file_format, **kwargs)
    return stream.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000"])
def test_truncated(process, tmp_path, file_format):
    whole = encoded(file_format, mode="P" if file_format == "GIF" else "RGB")
    file = tmp_path / f"cut.{file_format.lower()}"
    file.write_bytes(whole)
    process(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"cut\.{file_format.lower()}: (the image is damaged|not an image)"):
        process(file)
    with pytest.raises(ValueError, match=r"data:image/.*\.\.\.: (the image is damaged|no such image)") as error:
        process(f"data:image/{file_format.lower()};base64,{base64.b64encode(whole[: len(whole) // 2]).decode()}")
    assert len(str(error.value)) < 300  # the picture itself is not in the message


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_truncated_after_it_was_opened(process, tmp_path, file_format):
    file = tmp_path / "cut"
    file.write_bytes(encoded(file_format)[:-300])
    with pytest.raises(ValueError, match="cut: damaged or cut off"):
        process(Image.open(file))


def test_damaged_metadata(process, tmp_path):
    """Which side is up cannot be known; Pillow calls it a SyntaxError."""
    file = tmp_path / "scan.webp"
    Image.new("RGB", (8, 8)).save(file, exif=b"Exif\0\0no TIFF header follows")
    with pytest.raises(ValueError, match=r"scan.webp: damaged or cut off \(not a TIFF file"):
        process(file)


def test_no_image_at_all(process, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("The liver is on the left.")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"notes.txt: not an image that can be read here"):
        process(file)
    with pytest.raises(ValueError, match=r"empty.png: not an image"):
        process(tmp_path / "empty.png")
    for missing in (tmp_path / "missing.png", str(tmp_path / "missing.png"), "missing", tmp_path, "a\0b"):
        with pytest.raises(ValueError, match="no such image file"):
            process(missing)
    for address in ("data:image/png;base64,@@@", f"data:image/png;base64,{base64.b64encode(b'liver').decode()}"):
        with pytest.raises(ValueError, match=r"data:image/png.*: no such image file"):
            process(address)


def test_a_decompression_bomb(process, tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(file)  # 50 kB
    with pytest.raises(ValueError, match=r"bomb.png: Image size \(400000000 pixels\) exceeds limit .* shrink"):
        process(file)


@pytest.mark.parametrize("file_format", ["EPS", "ICO", "FITS"])
def test_formats_that_nobody_needs_are_not_tried(tmp_path, file_format):
    """Pillow would start Ghostscript for the first, and had a bomb in the last."""
    file = tmp_path / "image"
    fits = (
        b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720)
    )
    file.write_bytes(fits if file_format == "FITS" else encoded(file_format))
    with pytest.raises(ValueError, match="not an image that can be read here"):
        open_image(file)
    assert file_format not in FORMATS


def test_things_that_are_no_images(process, pixels):
    for thing, named in (
        (None, "NoneType"),
        (3, "int"),
        (b"abc", "bytes"),
        ({"path": "x"}, "dict"),
        ([Image.new("RGB", (3, 3)), None], "NoneType"),
        ([], "at least one image"),
        (np.zeros((0, 10, 3), np.uint8), r"no pixels, its size is \(10, 0\)"),
        (pixels[..., :2], r"shape \(20, 30, 2\)"),
        (np.zeros((7, 8, 9), np.uint8), r"shape \(7, 8, 9\)"),
        (pixels.astype(int) * 2, "colours go from 0 to 510"),
        (pixels / 100 - 1, r"colours go from -1 to 1\.55"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            process(thing)
        assert len(str(error.value)) < 200


@pytest.mark.filterwarnings("ignore")  # Pillow's own about the damage
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM"])
def test_any_damage_is_a_value_error_that_names_the_file(tmp_path, capfd, file_format):
    """Bytes of a good file changed at random: an image or one ValueError, never anything else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(file_format, (24, 16), "P" if file_format == "GIF" else "RGB",
                   **({"exif": exif} if file_format in ("PNG", "JPEG", "TIFF", "WEBP") else {}))  # fmt: skip
    file, chance, refused = tmp_path / "damaged", random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(chance.choice([1, 2, 8])):
            data[chance.randrange(min(len(data), chance.choice([60, 300, 10**6])))] = chance.choice([0, 255, 77])
        file.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            assert upright_rgb(open_image(file)).mode == "RGB"
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(file)), error
    assert 20 < refused < 200
    capfd.readouterr()  # libtiff writes to stderr itself


def test_an_opened_file_is_closed(tmp_path):
    file = tmp_path / "image.png"
    Image.new("RGB", (5, 5)).save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = open_image(file)
        file.unlink()
        assert upright_rgb(image).size == (5, 5)
        del image


# ------------------------------------------------------------------------------------------------------- save and load


def test_save_and_load(make_image, tmp_path):
    processor = BioD2CImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=IMAGENET_DEFAULT_MEAN)
    processor.save_pretrained(tmp_path / "one")
    again = BioD2CImageProcessor.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    outputs = [p(make_image(), return_tensors="pt")["pixel_values"] for p in (processor, again)]
    assert torch.equal(*outputs)


def test_travels_to_a_data_loaders_worker(make_image):
    """`DataLoader(num_workers=…)` with spawn pickles it."""
    processor = pickle.loads(pickle.dumps(BioD2CImageProcessor()))
    assert processor(make_image(), return_tensors="np")["pixel_values"].shape == (1, 3, 512, 512)
