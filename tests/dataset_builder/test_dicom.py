"""DICOM files to rows: the pixels beside the standard's formulas, what patients' data must never reach, broken files.

Every file is a real one, written by pydicom here or shipped with it.
"""

import importlib.metadata
import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biod2c.cli import main
from biod2c.dataset_builder.build import inputs_digest
from biod2c.dataset_builder.images import BadImageError, decode
from biod2c.dataset_builder.recipe import Recipe, SourceOptions
from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.sources.dicom import read_dicom

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_windowing  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid  # noqa: E402

from biod2c.dataset_builder.sources.dicom_pixels import read_header, read_picture  # noqa: E402

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
NAME, PATIENT, ACCESSION = "Zwiebelturm^Änne^^Dr.", "HOSP-4711-0815", "ACC99123"
SECRETS = ["Zwiebelturm", "Änne", "4711", "0815", "99123", "19510203", "Krankenhaus"]


def dicom_file(path, stored, *, modality="CT", patient=PATIENT, study=None, bits=12, **elements):
    """Write `stored` ([rows, columns], [frames, rows, columns] or RGB) with a header full of a patient's data."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.StudyInstanceUID = study or generate_uid()
    file.SpecificCharacterSet = "ISO_IR 100"
    file.PatientName, file.PatientID, file.PatientBirthDate = NAME, patient, "19510203"
    file.AccessionNumber, file.InstitutionName, file.Modality = ACCESSION, "Krankenhaus", modality
    colour = stored.ndim == 3 and stored.shape[-1] == 3
    file.SamplesPerPixel = 3 if colour else 1
    file.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        file.PlanarConfiguration = 0
    elif stored.ndim == 3:
        file.NumberOfFrames = len(stored)
    file.Rows, file.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    file.BitsAllocated = 8 * stored.itemsize
    file.BitsStored, file.HighBit = bits, bits - 1
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    file.PixelData = stored.tobytes()
    for keyword, value in elements.items():
        setattr(file, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def shown(path):
    """The picture's pixels."""
    data, _ = read_picture(path, read_header(path))
    return np.asarray(decode(data))


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


# --- pixels


def closed_form(x, center, width, function):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2 for one value, y from 0 to 255, as the standard writes them."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(-4 * (x - center) / width))
    if function == "LINEAR_EXACT":
        if x <= center - width / 2:
            return 0
        return 255 if x > center + width / 2 else ((x - center) / width + 0.5) * 255
    if x <= center - 0.5 - (width - 1) / 2:
        return 0
    if x > center - 0.5 + (width - 1) / 2:
        return 255
    return ((x - (center - 0.5)) / (width - 1) + 0.5) * 255


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(40, 400, "LINEAR"), (-600, 1500, "LINEAR"), (35, 1, "LINEAR"), (40, 400, "LINEAR_EXACT"), (40, 400, "SIGMOID")],
)
def test_a_ct_is_windowed_as_the_standard_says(tmp_path, center, width, function):
    path = dicom_file(
        tmp_path / "ct.dcm",
        RAMP,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=[center, 300],  # the first window counts
        WindowWidth=[width, 2000],
        VOILUTFunction=function,
    )
    expected = np.array([closed_form(x - 1024, center, width, function) for x in range(4096)]).reshape(64, 64)
    assert np.abs(shown(path) - expected).max() <= 0.5
    header = pydicom.dcmread(path)
    theirs = apply_windowing(RAMP - 1024.0, header)  # pydicom's own, from -1024 to 3071
    assert np.abs(shown(path) - (theirs + 1024) / 4095 * 255).max() <= 0.5


def test_hand_computed_values_of_the_brain_window(tmp_path):
    hounsfield = np.array([[-1000, 0, 40, 79, 80, 1000]])
    stored = ((hounsfield + 1024) // 2).astype(np.uint16)  # slope 2; 79 is stored as 551, which is 78 again
    path = dicom_file(tmp_path / "a", stored, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    # y = ((x - 39.5) / 79 + 0.5) * 255: 0 -> 0, 40 -> 129.1, 78 -> 251.8, 80 -> 255
    assert shown(path).tolist() == [[0, 0, 129, 252, 255, 255]]


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    dark = dicom_file(tmp_path / "1", RAMP, modality="CR", PhotometricInterpretation="MONOCHROME1", **window)
    bright = dicom_file(tmp_path / "2", RAMP, modality="CR", **window)
    assert (shown(dark).astype(int) + shown(bright) == 255).all()
    assert shown(dark)[0, 0] == 255


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": 40}])
def test_without_a_usable_window_the_percentiles_are_the_range(tmp_path, window):
    values = np.random.default_rng(0).normal(1000, 100, (100, 100)).astype(np.int16)
    values[0, 0], values[0, 1:50] = 30_000, -2000  # one hot pixel, and padding
    path = dicom_file(tmp_path / "mr.dcm", values, modality="MR", bits=16, PixelPaddingValue=-2000, **window)
    pixels = shown(path)
    inside = np.sort(values[values != -2000])
    low, high = inside[round(0.01 * len(inside))], inside[round(0.99 * len(inside))]
    assert abs(values[pixels > 0].min() - low) <= 2 and abs(values[pixels < 255].max() - high) <= 2
    assert 110 < pixels[values == 1000].mean() < 145


@pytest.mark.parametrize("vr", ["US", "OW", "OW packed"])
def test_a_voi_table_of_8_bit_entries_over_12_bit_values(tmp_path, vr):
    table = Dataset()
    table.LUTDescriptor = [2000, 1000, 8]
    entries = np.linspace(0, 255, 2000).astype(np.uint8 if "packed" in vr else np.uint16)
    table.add_new("LUTData", vr[:2], entries.tolist() if vr == "US" else entries.tobytes())
    path = dicom_file(tmp_path / "dx.dcm", RAMP, modality="DX", VOILUTSequence=[table], WindowCenter=1, WindowWidth=2)
    pixels = shown(path).ravel()
    assert (pixels[:1001] == 0).all() and (pixels[2999:] == 255).all()
    assert pixels[1000 + 500] == int(500 / 1999 * 255)


def test_the_middle_frame_with_its_own_window(tmp_path):
    frames = np.stack([RAMP * 0, RAMP, RAMP * 0])
    groups = []
    for center in (1, 1000, 2):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, 2
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    path = dicom_file(tmp_path / "enhanced.dcm", frames, PerFrameFunctionalGroupsSequence=groups)
    assert np.flatnonzero(shown(path))[0] == 1000 and shown(path).shape == (64, 64)


def test_colours_and_8_bit_greys_stay_as_they_are(tmp_path):
    colours = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert (shown(dicom_file(tmp_path / "us.dcm", colours, modality="US", bits=8)) == colours).all()
    greys = np.random.default_rng(2).integers(50, 90, (20, 30), dtype=np.uint8)
    assert (shown(dicom_file(tmp_path / "cr.dcm", greys, modality="CR", bits=8)) == greys).all()


def test_files_that_others_wrote():
    """The same picture in five encodings, a palette, and JPEG 2000, which Pillow decodes."""
    names = ["", "_bigendian", "_expb", "_implicit", "_RLE", "_jp2klossless"]
    first, *others = (shown(SHIPPED / f"MR_small{name}.dcm") for name in names)
    assert all((other == first).all() for other in others)
    assert shown(SHIPPED / "examples_palette.dcm").shape == (350, 800, 3)
    assert shown(SHIPPED / "examples_ybr_color.dcm").shape == (240, 320, 3)  # the 16th of 30 frames


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", "JPEG Lossless.*nothing here decodes: pip install"),
        ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS Lossless.*pip install"),
        ("JPGExtended.dcm", "JPEG Extended.*another decoder: pip install"),
        ("MR_truncated.dcm", "cut or broken"),
        ("image_dfl.dcm", "deflated"),
        ("reportsi.dcm", "no image in the file"),
        ("no_meta.dcm", "not a DICOM file"),
        ("README.txt", "not a DICOM file"),
    ],
)
def test_files_without_a_picture_say_why(name, reason):
    with pytest.raises(BadImageError, match=reason):
        shown(SHIPPED / name)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    with pytest.raises(BadImageError, match="decompression bomb"):
        shown(dicom_file(tmp_path / "bomb", RAMP, Rows=60_000, Columns=60_000))


@pytest.mark.parametrize("name", ["CT_small.dcm", "SC_rgb_small_odd_jpeg.dcm", "MR_small_RLE.dcm"])
def test_bytes_broken_anywhere_give_a_picture_or_a_reason(tmp_path, name):
    whole, chooser = (SHIPPED / name).read_bytes(), random.Random(name)
    path, refused = tmp_path / "broken.dcm", 0
    write_table(tmp_path, [{"image": "broken.dcm", "question": "What?", "answer": "A"}])
    for _ in range(60):
        data = bytearray(whole[: chooser.choice([len(whole), chooser.randrange(len(whole))])])
        for _ in range(chooser.randrange(20)):
            data[chooser.randrange(len(data))] = chooser.randrange(256)
        path.write_bytes(data)
        rows, report = read(tmp_path)
        assert len(rows) + len(report.bad_rows) == 1
        refused += len(report.bad_rows)
    assert 0 < refused < 60


# --- rows


@pytest.fixture
def study(tmp_path):
    """Two patients' files, named after them, and a table: the first patient in two studies."""
    root = tmp_path / "export"
    files = {
        "Zwiebelturm_4711/ct1.dcm": {"patient": PATIENT, "BodyPartExamined": "CHEST"},
        "Zwiebelturm_4711/ct2.dcm": {"patient": PATIENT},
        "other.dcm": {"patient": "P2"},
    }
    for number, (name, elements) in enumerate(files.items()):
        dicom_file(root / name, RAMP + np.uint16(number), **elements)
    write_table(root, [{"image": name, "question": f"Question {n}?", "answer": "Yes"} for n, name in enumerate(files)])
    return root


def write_table(root, rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(root, **options):
    report = Report()
    return list(read_dicom(root, report, **options)), report


def test_nothing_of_the_patient_is_in_the_rows_or_the_report(study):
    with (study / "questions.jsonl").open("a") as table:
        missing = {"image": "Zwiebelturm_4711/gone.dcm", "question": "Where?", "answer": "Krankenhaus"}
        telling = {"image": "other.dcm", "question": "Is Änne Zwiebelturm ill?", "answer": "No"}
        number = {"image": "other.dcm", "question": "What is seen?", "answer": f"See {ACCESSION}."}
        turns = [{"role": "user", "content": f"This is {PATIENT}."}]
        earlier = {"image": "Zwiebelturm_4711/ct1.dcm", "question": "Ill?", "answer": "No", "history": turns}
        table.writelines(json.dumps(row) + "\n" for row in (missing, telling, number, earlier))
    rows, report = read(study)
    assert len(rows) == 3
    assert [(bad["row"], bad["field"]) for bad in report.bad_rows] == [
        (3, "image"),
        (4, "question"),
        (5, "answer"),
        (6, "history"),
    ]
    uids = [
        str(pydicom.dcmread(p)[k].value) for p in study.rglob("*.dcm") for k in ("StudyInstanceUID", "SOPInstanceUID")
    ]
    written = repr(rows) + repr(report)
    pixels = b"".join(row["image"]["bytes"] for row in rows)
    for secret in [*SECRETS, *uids, "ct1", ".dcm"]:
        assert secret.lower() not in written.lower() and secret.encode() not in pixels, secret


def test_nothing_of_the_patient_is_in_the_folder_that_is_built(study, tmp_path):
    with (study / "questions.jsonl").open("a") as table:
        table.write('{"image": "Zwiebelturm_4711/gone.dcm", "question": "Where?", "answer": "There"}\n')
    output = tmp_path / "dataset"
    command = ["build", "ingest", "--source", "dicom", "--data", str(study), "--license", "CC-BY-4.0"]
    assert main([*command, "--output", str(output)]) == 0
    written = b"".join(
        path.read_bytes() + str(path.relative_to(output)).encode() for path in output.rglob("*") if path.is_file()
    )
    assert b"PAR1" in written and b"(not shown)" in written
    assert [secret for secret in SECRETS if secret.encode() in written or secret.encode("latin-1") in written] == []


def test_a_row_says_modality_body_part_and_licence_and_is_named_after_its_content(study):
    (first, second, _), report = read(study, license="CC-BY-4.0")
    assert (first["modality"], first["organ"], second["organ"]) == ("CT", "CHEST", None)
    assert (first["license"], first["source_split"], first["language"]) == ("CC-BY-4.0", "train", "en")
    assert first["image_id"] == first["image"]["path"] == f"{first['image_sha256'][:16]}.png"
    assert Image.open(io.BytesIO(first["image"]["bytes"])).info == {}
    assert report.notes == []


def test_a_patients_images_stay_together_without_a_trace_of_the_id(study):
    rows, _ = read(study)
    groups = [row["group"] for row in rows]
    assert groups[0] == groups[1] != groups[2]
    # Another patient id in the same files gives the same bytes: nothing of it can be read back.
    for path in study.rglob("ct*.dcm"):
        file = pydicom.dcmread(path)
        file.PatientID = "another"
        file.save_as(path)
    assert read(study)[0] == rows


def test_studies_are_groups_where_there_is_no_patient_id_and_the_table_may_say_otherwise(tmp_path):
    one = generate_uid()
    for number, study in enumerate([one, one, generate_uid()]):
        dicom_file(tmp_path / f"{number}.dcm", RAMP + np.uint16(number), patient="", study=study)
    rows = [{"image": f"{n}.dcm", "question": "What?", "answer": "A lung"} for n in range(3)]
    write_table(tmp_path, rows)
    groups = [row["group"] for row in read(tmp_path)[0]]
    assert groups[0] == groups[1] != groups[2]
    write_table(tmp_path, [{**row, "group": group} for row, group in zip(rows, "aba", strict=True)])
    groups = [row["group"] for row in read(tmp_path)[0]]
    assert groups[0] == groups[2] != groups[1]
    assert not set("ab") & set(groups)


def test_one_patient_id_for_many_studies_is_pointed_out(tmp_path):
    for number in range(2):
        dicom_file(tmp_path / f"{number}.dcm", RAMP + np.uint16(number), patient="ANON")
    write_table(tmp_path, [{"image": f"{n}.dcm", "question": "What?", "answer": "A lung"} for n in range(2)])
    assert "2 studies are of one patient" in read(tmp_path)[1].notes[0]


def test_burned_in_text_is_counted_once_an_image_and_warned_about(tmp_path):
    colours = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    cases = {
        "yes": {"modality": "US", "BurnedInAnnotation": "YES"},
        "no": {"modality": "US", "BurnedInAnnotation": "NO"},
        "us": {"modality": "US"},
        "ct": {"modality": "CT"},
        "screen": {"modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    }
    for number, (name, elements) in enumerate(cases.items()):
        dicom_file(tmp_path / name, colours // (number + 1), bits=8, **elements)
    write_table(tmp_path, [{"image": name, "question": f"{q}?", "answer": "A"} for name in cases for q in "ab"])
    rows, report = read(tmp_path)
    assert len(rows) == 10
    names = {name: rows[2 * number]["image_id"] for number, name in enumerate(cases)}
    assert report.quirks["dicom: images that declare burned-in text"] == 1
    assert report.quirks["dicom: images that do not deny burned-in text"] == 2
    assert (
        names["yes"] in report.notes[0]
        and names["us"] in report.notes[1]
        and names["screen"] in report.notes[1]
        and "WARNING" in report.notes[0]
    )
    assert not any(names["no"] in note or names["ct"] in note for note in report.notes)


def test_frames_and_files_without_questions_are_counted(tmp_path):
    dicom_file(tmp_path / "film", np.stack([RAMP, RAMP]))
    dicom_file(tmp_path / "unused", RAMP)
    write_table(tmp_path, [{"image": "film", "question": "What?", "answer": "A"}])
    report = read(tmp_path)[1]
    assert report.quirks["dicom: several frames, the middle one taken"] == 1
    assert report.quirks["dicom: file that no row asks about"] == 1


def test_files_that_cannot_be_used_are_bad_rows(study, tmp_path):
    (tmp_path / "outside.dcm").write_bytes((study / "other.dcm").read_bytes())
    file = pydicom.dcmread(study / "other.dcm")
    file.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    file.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 lossless"])
    file.save_as(study / "lossless.dcm")
    (study / "cut.dcm").write_bytes((study / "other.dcm").read_bytes()[:-100])
    names = ["../outside.dcm", "lossless.dcm", "cut.dcm", "nowhere.dcm", "other.dcm"]
    write_table(study, [{"image": name, "question": "What?", "answer": "A"} for name in names])
    rows, report = read(study)
    assert len(rows) == 1
    reasons = [bad["expected"] for bad in report.bad_rows]
    assert "inside the folder" in reasons[0] and "pip install python-gdcm" in reasons[1] and "cut" in reasons[2]
    assert {bad["found"] for bad in report.bad_rows} == {"'(not shown)'"}


def test_a_decoder_that_is_installed_later_makes_a_new_build(study, monkeypatch):
    recipe = Recipe(sources={"dicom": SourceOptions(study)})
    before = inputs_digest(recipe)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2" if name == "python-gdcm" else version(name))
    assert inputs_digest(recipe) != before


def test_without_pydicom_the_extra_is_named(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SourceError, match=r"pip install 'biod2c\[dicom\]'"):
        read(study)
