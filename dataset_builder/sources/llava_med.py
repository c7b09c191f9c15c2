"""LLaVA-Med's alignment set (Li et al., NeurIPS 2023; CC BY-NC 4.0): 467 k figures of PMC papers, each with an
instruction and its caption, on which stage 1 trains.

alignment_500k.json is one list of {id, image, "conversatons" (sic) or "conversations"}; the human turn is the
instruction with the mark <image>. The figures are not part of it: llava_med_image_urls.jsonl says in which PMC package,
at which path, each one lies. They are taken from images/, where the authors' script leaves them, or read out of the
packages in pmc_articles/, packed (PMC2857854.tar.gz) or not (PMC2857854/). There are no splits, all rows are training
rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..report import BadRowError, Report, SourceError
from ..schema import CAPTION, Row, new_row
from .archives import MemberError, is_inside, read_packed_image
from .pmc import figure_columns, paper, stem
from .raw import ImageFolder, Images, require_english, rows_of, text
from .records import Lookup, read_jsonl, read_long_json_list

TABLES = ("alignment_500k.json", "llava_med_alignment_500k.json")
URLS = "llava_med_image_urls.jsonl"
PACKAGES = "pmc_articles"
LICENSE = "CC-BY-NC-4.0"
ROLES = {"human": "user", "gpt": "assistant"}
IMAGE_MARK = "<image>"


def read_llava_med(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield LLaVA-Med's rows in the order of its list. `group` is the paper, `caption` the answer.

    SourceError without the list, or with neither the figures' places nor the figures.
    """
    require_english("llava_med", languages)
    folders = (root, root / "alignment")
    path = next((folder / name for folder in folders for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        raise SourceError(f"{root}: no LLaVA-Med list; expected {' or '.join(TABLES)} in this folder or in alignment/")
    figures = Figures(root, report)
    make_row = partial(llava_med_row, figures=figures, report=report)
    records = read_long_json_list("llava_med", path, report)
    yield from rows_of("llava_med", path, records, report, make_row, set(), id_field="id")


def llava_med_row(number: int, record: Mapping[str, Any], *, figures: "Figures", report: Report) -> Row:
    """One row in the schema. BadRowError if a field cannot be used."""
    name = text(record, "image", report)
    turns = dialogue(record, report)
    image = figures.read(name)
    return new_row(
        id=f"llava_med-{text(record, 'id', report)}",
        question=turns[-2]["content"],
        answer=turns[-1]["content"],
        history=turns[:-2],
        question_type=CAPTION if len(turns) == 2 else None,
        language="en",
        caption=turns[-1]["content"] if len(turns) == 2 else None,
        source="llava_med",
        source_split="train",
        license=LICENSE,
        **figure_columns(name, image, figures.paper(name), report),
    )


def dialogue(record: Mapping[str, Any], report: Report) -> list[dict[str, str]]:
    """The turns as {role, content}, user and assistant by turns, without the mark of the image. BadRowError unless they
    are so and each has a text.
    """
    field = "conversations" if "conversations" in record else "conversatons"
    turns = record.get(field)
    alternate = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    speakers = [turn.get("from") for turn in turns] if isinstance(turns, list) and alternate else []
    if not speakers or speakers != list(ROLES) * (len(speakers) // 2):
        raise BadRowError(field, turns, "turns of human and gpt, one after the other", "mend the row in the file")
    return [_turn(turn, report) for turn in turns or []]


def _turn(turn: Mapping[str, Any], report: Report) -> dict[str, str]:
    value = turn.get("value")
    words = {"value": value.replace(IMAGE_MARK, " ") if isinstance(value, str) else value}
    return {"role": ROLES[turn["from"]], "content": text(words, "value", report)}


class Figures(Images):
    """The figures by their names in the list, wherever they lie under the raw folder."""

    def __init__(self, root: Path, report: Report) -> None:
        """SourceError if neither the figures nor their places are there."""
        super().__init__("image")
        self._packages = root / PACKAGES
        self._folder = ImageFolder(root / "images", "image") if (root / "images").is_dir() else None
        urls = root / URLS
        if self._folder is None and not urls.is_file():
            raise SourceError(f"{root}: no figures; expected {URLS} and {PACKAGES}/, or images/, in this folder")
        if not urls.is_file():
            report.notes.append(f"llava_med: no {URLS}, so a figure's paper is not known")
        self._places = Lookup(_places(urls, report) if urls.is_file() else [])

    def find(self, name: str) -> bytes:
        """The figure's bytes; BadRowError if it is nowhere, or cannot be read where it is."""
        if not is_inside(name):
            raise self.bad(name, "a name without a way out of its folder", "mend the row in the file")
        if self._folder is not None:
            with suppress(BadRowError):
                return self._folder.find(name)
        places = self._places.find(stem(name))
        if not places:
            raise self.bad(name, f"a figure in images/, or its place in {URLS}")
        package, member = places[0]
        unpacked = package.removesuffix(".tar.gz")
        if (self._packages / unpacked).is_dir():
            return ImageFolder(self._packages, self.field).find(member)
        try:
            return read_packed_image(self._packages / package, member)
        except MemberError as error:
            raise self.bad(name, f"{member} in {PACKAGES}/{package} ({error})", "fetch the package again") from error

    def paper(self, name: str) -> str | None:
        """The paper a figure is from, if its place is known."""
        return next((paper(package) for package, _ in self._places.find(stem(name))), None)


def _places(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    """(pair, package's file name, path in it) of each line."""
    for number, record in read_jsonl("llava_med", path, report):
        try:
            package = text(record, "pmc_tar_url", report).rpartition("/")[2]
            yield text(record, "pair_id", report), package, text(record, "image_file_path", report)
        except BadRowError as error:
            report.skip("llava_med", path, number, error)
