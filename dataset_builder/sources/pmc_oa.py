"""PMC-OA (Lin et al., MICCAI 2023; each article's own licence): 1.65 M sub-figures of PMC papers and their captions.

pmc_oa.jsonl has one {image, caption} a line, each sub-figure with its part of the caption; pmc_oa_beta.jsonl has the
whole compound captions and is read only where the other is not there. Older files have the paper in `pmcid` too. The
images lie in images.zip, in its folder caption_T060_filtered_top4_sep_v0_subfigures. There are no splits, all rows are
training rows. An article's licence is that of PMC's own list, where oa_file_list.csv lies in the folder.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..captions import INSTRUCTIONS
from ..report import Report, SourceError
from ..schema import CAPTION, Row, new_row
from .archives import open_images
from .pmc import caption_text, figure_columns, paper, stem
from .raw import Images, optional_text, require_english, rows_of, text
from .records import Lookup, read_csv, read_jsonl

TABLES = ("pmc_oa.jsonl", "pmc_oa_beta.jsonl")
ZIPPED_FOLDER = "caption_T060_filtered_top4_sep_v0_subfigures"
FOLDERS = (f"images/{ZIPPED_FOLDER}", ZIPPED_FOLDER, "images")
LICENSE = "per article"
LICENSE_LIST = "oa_file_list.csv"


def read_pmc_oa(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield PMC-OA's rows in the order of its table: an instruction and the caption. `group` is the paper.

    SourceError without a table or without images.
    """
    require_english("pmc_oa", languages)
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if not tables:
        raise SourceError(f"{root}: no PMC-OA table; expected {' or '.join(TABLES)} in this folder")
    report.notes.extend(f"pmc_oa: {path.name} not read, {tables[0].name} is" for path in tables[1:])
    images = open_images(root, FOLDERS, "images.zip", "image")
    make_row = partial(pmc_oa_row, images=images, licenses=article_licenses(root, report), report=report)
    records = read_jsonl("pmc_oa", tables[0], report)
    yield from rows_of("pmc_oa", tables[0], records, report, make_row, set(), id_field="image")


def pmc_oa_row(number: int, record: Mapping[str, Any], *, images: Images, licenses: Lookup, report: Report) -> Row:
    """One row in the schema. BadRowError if a field cannot be used, so if the caption is empty."""
    name = text(record, "image", report)
    caption = caption_text(record, "caption", report)
    pmcid = paper(optional_text(record, "pmcid", report) or "") or paper(name)
    return new_row(
        id=f"pmc_oa-{stem(name)}",
        question=random.Random(name).choice(INSTRUCTIONS["caption"]),
        answer=caption,
        question_type=CAPTION,
        language="en",
        caption=caption,
        source="pmc_oa",
        source_split="train",
        license=next((license for _, license in licenses.find(pmcid or "")), LICENSE),
        **figure_columns(name, images.read(name), pmcid, report),
    )


def article_licenses(root: Path, report: Report) -> Lookup:
    """Each article's licence by its PMCID, from PMC's list; none, and a note, where the list does not lie in `root`."""
    path = root / LICENSE_LIST
    if not path.is_file():
        report.notes.append(f"pmc_oa: no {LICENSE_LIST}, so each row's license is '{LICENSE}'")
        return Lookup([])
    records = read_csv("pmc_oa", path, report, ("Accession ID", "License"))
    return Lookup((record["Accession ID"], "", record["License"]) for _, record in records if record["License"])
