"""Make this folder's small copies of SLAKE and VQA-RAD from their full raw folders.

    python examples/shrink.py --slake RAW --vqa_rad RAW --output examples

What comes out is still the sources' own raw layout, so that everything that reads the full data reads these files
too. Images are shrunk so that the longer side is at most 256 pixels (smaller files are copied byte for byte); SLAKE's
boxes are scaled by the same factor, and its masks are shrunk with nearest neighbour, because a mixed grey value would
name another organ. Left out: rows in Chinese, test rows (a demo must not train on them) and SLAKE's question.json,
which repeats rows of all splits.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

LONGEST_SIDE = 256
JPEG_QUALITY = 88
SLAKE_SPLITS = ("train.json", "validate.json")
RAD_JSON = "VQA_RAD Dataset Public.json"
RAD_IMAGES = "VQA_RAD Image Folder"


def shrink_factor(size: tuple[int, int]) -> float:
    """The factor (at most 1) that brings the longer of `size` (width, height in pixels) down to LONGEST_SIDE."""
    return min(1.0, LONGEST_SIDE / max(size))


def shrunk_size(size: tuple[int, int]) -> tuple[int, int]:
    """`size` after shrinking, in whole pixels, never 0."""
    factor = shrink_factor(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def shrink_photo(source: Path, target: Path) -> tuple[int, int]:
    """Write a shrunk JPEG and return the original's (width, height). A small image keeps its very bytes."""
    with Image.open(source) as image:
        if max(image.size) <= LONGEST_SIDE:
            shutil.copyfile(source, target)
        else:
            small = image.convert("RGB").resize(shrunk_size(image.size), Image.Resampling.LANCZOS)
            small.save(target, "JPEG", quality=JPEG_QUALITY, optimize=True)
        return image.size


def shrink_mask(source: Path, target: Path) -> None:
    """Write a mask shrunk with nearest neighbour: every value in it stays one of mask.txt's."""
    with Image.open(source) as mask:
        mask.resize(shrunk_size(mask.size), Image.Resampling.NEAREST).save(target, optimize=True)


def shrink_boxes(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Scale detection.json's [x, y, width, height] from an image of `size` to its shrunk copy, to a tenth of a
    pixel.
    """
    factor = shrink_factor(size)
    objects: list[dict[str, list[float]]] = json.loads(source.read_text(encoding="utf-8-sig"))
    scaled = [{name: [round(v * factor, 1) for v in box] for name, box in entry.items()} for entry in objects]
    target.write_text(json.dumps(scaled), encoding="utf-8")


def write_rows(rows: list[dict[str, Any]], target: Path) -> None:
    """One JSON list with a row a line, so that a change shows as a line in a diff."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    target.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def shrink_slake(raw: Path, output: Path) -> None:
    """English train and validate rows, their images with boxes and masks, the knowledge graph and mask.txt."""
    output.mkdir(parents=True, exist_ok=True)
    image_names: set[str] = set()
    for split in SLAKE_SPLITS:
        rows = json.loads((raw / split).read_text(encoding="utf-8-sig"))
        english = [row for row in rows if row["q_lang"] == "en"]
        image_names.update(row["img_name"] for row in english)
        write_rows(english, output / split)
    for name in sorted(image_names):
        shrink_slake_image(raw / "imgs" / name, output / "imgs" / name)
    (output / "KG").mkdir(exist_ok=True)
    for name in ["mask.txt", *(f"KG/{table.name}" for table in sorted((raw / "KG").glob("*.csv")))]:
        shutil.copyfile(raw / name, output / name)


def shrink_slake_image(source: Path, target: Path) -> None:
    """One image's folder: source.jpg, detection.json and, where the source has one, mask.png."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = shrink_photo(source, target)
    shrink_boxes(source.with_name("detection.json"), target.with_name("detection.json"), size)
    if source.with_name("mask.png").exists():
        shrink_mask(source.with_name("mask.png"), target.with_name("mask.png"))


def shrink_vqa_rad(raw: Path, output: Path) -> None:
    """The rows whose phrase_type does not start with "test", as they are, and the images they ask about."""
    (output / RAD_IMAGES).mkdir(parents=True, exist_ok=True)
    rows = json.loads((raw / RAD_JSON).read_text(encoding="utf-8-sig"))
    training = [row for row in rows if not row["phrase_type"].startswith("test")]
    write_rows(training, output / RAD_JSON)
    for name in sorted({row["image_name"] for row in training}):
        shrink_photo(raw / RAD_IMAGES / name, output / RAD_IMAGES / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make examples/ from the sources' raw folders.")
    parser.add_argument(
        "--slake", type=Path, required=True, help="SLAKE's raw folder (train.json, imgs/, KG/, mask.txt)"
    )
    parser.add_argument("--vqa_rad", type=Path, required=True, help="VQA-RAD's raw folder (its JSON and image folder)")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets slake/ and vqa_rad/")
    arguments = parser.parse_args()
    shrink_slake(arguments.slake, arguments.output / "slake")
    shrink_vqa_rad(arguments.vqa_rad, arguments.output / "vqa_rad")


if __name__ == "__main__":
    main()
