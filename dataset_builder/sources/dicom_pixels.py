"""One DICOM file to an 8-bit picture, as a viewer shows it by default (DICOM PS3.3, C.11.1 and C.11.2).

Stored values go through the modality transformation (slope and intercept, or a table), then through the VOI table or
the window that the file names first; a window that is missing or cannot be used is replaced by the range from the 1st
to the 99th percentile, padding left out. Values of 8 bits and less without a window are shown as they are. MONOCHROME1
is inverted, so that more is always brighter. Of several frames the middle one is taken: a volume's first slice lies at
the body's edge, and a film's frames are alike.

Only the elements in HEADER are read, of which the reader (dicom.py) passes on two. pydicom meets broken files with
exceptions of every kind, some of which quote the header; so the functions that a reader calls turn them all into
BadImageError, which names the kind alone.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder, pixel_array
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..images import BadImageError

IDENTIFIERS = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "AccessionNumber"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
)
TEXTS = ("SOPClassUID", "Modality", "BodyPartExamined", "BurnedInAnnotation", *IDENTIFIERS)
PIXELS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsStored"),
    *("PixelRepresentation", "PixelPaddingValue", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(
        f"{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for part in ("Data", "Descriptor")
    ),
)
HEADER = (*TEXTS, *PIXELS)
PERCENTILES = (1, 99)
PLUGINS = "pip install python-gdcm, or pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg"


def read_header(path: Path) -> Dataset:
    """The elements in HEADER and the file's transfer syntax, without pixels. BadImageError if it is not
    DICOM or cannot be parsed.
    """
    with _as_bad_image("not a DICOM file that can be read"):
        if read_file_meta_info(path).TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            raise BadImageError("deflated as a whole, which may hide a bomb; write it uncompressed, as dcmconv does")
        return dcmread(path, stop_before_pixels=True, specific_tags=[Tag(name) for name in HEADER])


def header_texts(header: Dataset) -> dict[str, str]:
    """The elements in TEXTS, "" where one is missing. BadImageError if one is broken: a patient whose number cannot be
    read could land on both sides of a split.
    """
    with _as_bad_image("a header that is broken"):
        return {name: str(header.get(name) or "").strip() for name in TEXTS}


def read_picture(path: Path, header: Dataset) -> tuple[bytes, int]:
    """A PNG of 8 bits, grey or RGB, and how many frames the file has. BadImageError says why there is none."""
    if "Rows" not in header:
        raise BadImageError("no image in the file, but a report, a plan or the like")
    with _as_bad_image("pixels that are cut or broken"):
        frames = int(header.get("NumberOfFrames") or 1)
        rows, columns = header.Rows, header.Columns
        if rows * columns > (Image.MAX_IMAGE_PIXELS or np.inf):
            raise BadImageError(f"{rows} x {columns} pixels (a decompression bomb?)")
        stored = _stored(path, header, frames // 2)
        if header.PhotometricInterpretation == "PALETTE COLOR":
            stored, bits = apply_color_lut(stored, header), header.RedPaletteColorLookupTableDescriptor[2]
            shown = stored / (2**bits - 1)
        elif stored.ndim == 3:
            shown = stored / (2**header.BitsStored - 1)
        else:
            _take_frame_values(header, frames // 2)
            shown = grey(stored, header)
        pixels = np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=4)  # 6, the default, takes twice as long for 1 %
    return stream.getvalue(), frames


@contextmanager
def _as_bad_image(what: str) -> Iterator[None]:
    """Any failure in the block as BadImageError, and pydicom's many warnings unheard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"{what} ({type(error).__name__})") from error


def _stored(path: Path, header: Dataset, frame: int) -> np.ndarray:
    """One frame's stored values, colours as RGB. BadImageError names the decoders to install if none here can."""
    syntax = header.file_meta.TransferSyntaxUID
    try:
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            raise BadImageError(f"compressed as {syntax.name}, which nothing here decodes: {PLUGINS}")
        return pixel_array(path, index=frame)
    except RuntimeError as error:  # also NotImplementedError, for a syntax that pydicom does not know
        raise BadImageError(f"compressed as {syntax.name}, broken or for another decoder: {PLUGINS}") from error


def _take_frame_values(header: Dataset, frame: int) -> None:
    """Lift a frame's slope and window out of the functional groups of an enhanced file (PS3.3 C.7.6.16)."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*shared[:1], *per_frame[frame : frame + 1]]:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name) or []:
                header.update(item)


def grey(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """The brightness of each pixel, from 0 to 1, out of the stored values [rows, columns]."""
    values = apply_modality_lut(stored, header)
    table = (header.get("VOILUTSequence") or [None])[0]
    window = _window(header)
    if table is not None:
        shown = through_table(values, table)
    elif window is not None:
        shown = through_window(values, *window)
    elif header.get("BitsStored", 16) <= 8 and not header.get("PixelRepresentation") and (values == stored).all():
        shown = stored / (2**header.BitsStored - 1)
    else:
        padding = header.get("PixelPaddingValue")
        inside = values[stored != padding] if padding is not None and (stored != padding).any() else values
        low, high = np.percentile(inside, PERCENTILES)
        shown = np.clip((values - low) / (high - low), 0, 1) if high > low else (values > low).astype(float)
    return 1 - shown if header.PhotometricInterpretation == "MONOCHROME1" else shown


def _window(header: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window; None if there is none, or none that the standard allows."""
    center, width = (header.get(name) for name in ("WindowCenter", "WindowWidth"))
    if center in (None, "") or width in (None, ""):
        return None
    center, width = (float(np.atleast_1d(value)[0]) for value in (center, width))
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    usable = np.isfinite([center, width]).all() and (width >= 1 if function == "LINEAR" else width > 0)
    return (center, width, function) if usable and function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") else None


def through_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, with outputs from 0 to 1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":  # pixels are steps one wide, so the outermost centres are width - 1 apart
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(float)
    return np.clip((values - center) / width + 0.5, 0, 1)


def through_table(values: np.ndarray, item: Dataset) -> np.ndarray:
    """PS3.3 C.11.2.1.1: entry 0 for values up to the first one mapped, the last entry for those above the table."""
    entries, first, bits = item.LUTDescriptor
    entries = entries or 2**16
    data = item.LUTData
    if isinstance(data, bytes):  # OW: words of 16 bits, or two entries of 8 bits in each
        table = np.frombuffer(data, "u1" if len(data) < 2 * entries else "<u2")
    else:
        table = np.asarray(data)
    places = np.clip(np.rint(values) - first, 0, min(entries, len(table)) - 1).astype(int)
    return table[places] / (2**bits - 1)
