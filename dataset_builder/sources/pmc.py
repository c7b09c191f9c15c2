"""What names of PubMed Central figures say: the paper they are from, and the figure that a sub-figure was cut from.

PMC-VQA and PMC-OA name an image PMC8253797_Fig4.jpg or, for a sub-figure that was found in it, PMC8253797_Fig4_11.jpg.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..images import ImageFile
from ..report import Report
from ..schema import Row
from .raw import image_columns, text


def paper(name: str) -> str | None:
    """The PMCID that a figure's name or an archive's path holds, None if it holds none."""
    match = re.search(r"(?<![A-Za-z0-9])PMC\d+", name)
    return match[0] if match else None


def stem(name: str) -> str:
    """A figure's name without folders and without its extension."""
    return re.sub(r"\.[A-Za-z]{3,4}$", "", name.rpartition("/")[2])


def figure(subfigure: str) -> str:
    """The name (without extension) of the figure that a sub-figure was cut from."""
    return re.sub(r"_\d+$", "", subfigure)


def figure_columns(name: str, image: ImageFile, pmcid: str | None, report: Report) -> Row:
    """As `image_columns`, but all figures of a paper are one group: they show the same patients and slides."""
    columns = image_columns(name, image)
    if pmcid is None:
        report.quirks["figure of an unknown paper: it is a group of its own"] += 1
        return columns
    return columns | {"group": pmcid}


def caption_text(record: Mapping[str, Any], field: str, report: Report) -> str:
    """A caption on one line. BadRowError if there is no text."""
    caption = record.get(field)
    return text({field: " ".join(caption.split()) if isinstance(caption, str) else caption}, field, report)
