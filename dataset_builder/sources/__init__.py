"""Sources, one module each: a generator of schema rows out of a raw folder in the source's own layout.

Every reader is called as `reader(folder, report, languages)`, and with the keywords of OPTIONS that the recipe sets. It
keeps the official splits (`source_split` is train, validation or test), mends and counts quirks, and puts a row that
cannot be used into the report instead of yielding it.
"""

from collections.abc import Callable, Iterator

from ..schema import Row
from .biovgq import read_biovgq
from .dicom import read_dicom
from .folder import read_folder
from .llava_med import read_llava_med
from .path_vqa import read_path_vqa
from .pmc_oa import read_pmc_oa
from .pmc_vqa import read_pmc_vqa
from .slake import read_slake
from .vqa_rad import read_vqa_rad

READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "biovgq": read_biovgq,
    "dicom": read_dicom,
    "folder": read_folder,
    "llava_med": read_llava_med,
    "path_vqa": read_path_vqa,
    "pmc_oa": read_pmc_oa,
    "pmc_vqa": read_pmc_vqa,
    "slake": read_slake,
    "vqa_rad": read_vqa_rad,
}
# A source's own options, by name; each takes one text.
OPTIONS: dict[str, tuple[str, ...]] = {"dicom": ("license",), "folder": ("license",)}
