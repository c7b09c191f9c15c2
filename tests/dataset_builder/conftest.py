"""Small folders in the sources' raw layouts, written by the tests, and one build of the demo's dataset that all may
read.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def examples():
    """The real data of the demo."""
    return ROOT / "examples"


@pytest.fixture(scope="session")
def demo_recipe():
    return ROOT / "recipes" / "demo" / "dataset.yaml"


@pytest.fixture(scope="session")
def demo(tmp_path_factory, demo_recipe):
    """The demo's dataset, built once."""
    from biod2c.dataset_builder.build import build
    from biod2c.dataset_builder.recipe import read_recipe

    return build(read_recipe(demo_recipe), tmp_path_factory.mktemp("demo") / "biovgq")


@pytest.fixture(scope="session")
def make_jpeg():
    """Bytes of a JPEG whose content depends on `seed`."""

    def make(seed=0, size=(40, 30)):
        pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG")
        return stream.getvalue()

    return make


@pytest.fixture
def slake_row():
    """A row of SLAKE's JSON about image xmlab<image>."""

    def make(qid, image=1, **fields):
        row = {
            "img_id": image,
            "img_name": f"xmlab{image}/source.jpg",
            "question": f"Question {qid}?",
            "answer": "Liver",
            "q_lang": "en",
            "location": "Abdomen",
            "modality": "CT",
            "answer_type": "OPEN",
            "base_type": "vqa",
            "content_type": "Organ",
            "triple": ["vhead", "_", "_"],
            "qid": qid,
        }
        return {**row, **fields}

    return make


@pytest.fixture
def make_slake(tmp_path, make_jpeg):
    """A SLAKE folder: `files` maps a file's name to its rows, `boxes` an image's number to its detection.json."""

    def make(files, boxes=None):
        root = tmp_path / "slake"
        for image in {row["img_id"] for rows in files.values() for row in rows if isinstance(row, dict)}:
            folder = root / "imgs" / f"xmlab{image}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "source.jpg").write_bytes(make_jpeg(image))
            (folder / "detection.json").write_text(json.dumps((boxes or {}).get(image, [])))
        for name, rows in files.items():
            (root / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return root

    return make


@pytest.fixture
def rad_row():
    """A row of VQA-RAD's JSON about image synpic<image>.jpg."""

    def make(qid, image=1, **fields):
        row = {
            "qid": qid,
            "phrase_type": "freeform",
            "qid_linked_id": "03f451ca",
            "image_case_url": "https://medpix.nlm.nih.gov/case",
            "image_name": f"synpic{image}.jpg",
            "image_organ": "CHEST",
            "evaluation": "evaluated",
            "question": f"Question {qid}?",
            "question_rephrase": "NULL",
            "question_relation": "NULL",
            "question_frame": "NULL",
            "question_type": "PRES",
            "answer": "Yes",
            "answer_type": "CLOSED",
        }
        return {**row, **fields}

    return make


@pytest.fixture
def make_rad(tmp_path, make_jpeg):
    """A VQA-RAD folder of these rows; its JSON starts with `prefix`."""

    def make(rows, prefix=b""):
        root = tmp_path / "vqa_rad"
        folder = root / "VQA_RAD Image Folder"
        folder.mkdir(parents=True)
        for number, name in enumerate(sorted({row["image_name"] for row in rows})):
            (folder / name).write_bytes(make_jpeg(100 + number))
        (root / "VQA_RAD Dataset Public.json").write_bytes(prefix + json.dumps(rows).encode())
        return root

    return make
