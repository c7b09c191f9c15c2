"""Sources, one module each: a generator of schema rows out of a raw folder in the source's own layout.

Every reader is called as `reader(folder, report, languages)`. It keeps the official splits (`source_split` is train,
validation or test), mends and counts quirks, and puts a row that cannot be used into the report instead of yielding
it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..report import Report
from ..schema import Row
from .llava_med import read_llava_med
from .pmc_oa import read_pmc_oa
from .pmc_vqa import read_pmc_vqa
from .slake import read_slake
from .vqa_rad import read_vqa_rad

READERS: dict[str, Callable[[Path, Report, Sequence[str]], Iterator[Row]]] = {
    "llava_med": read_llava_med,
    "pmc_oa": read_pmc_oa,
    "pmc_vqa": read_pmc_vqa,
    "slake": read_slake,
    "vqa_rad": read_vqa_rad,
}
