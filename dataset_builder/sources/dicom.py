"""A folder of DICOM files with a table of questions beside them, whose column `image` names the files (folder.py).

DICOM headers are full of names, numbers and dates of patients, and so are file names. So pixels become a new PNG
(dicom_pixels.py) that is named after its own content; of the header only Modality and BodyPartExamined enter the
dataset, where the table has no `modality` and `organ`; PatientID, or where that is empty StudyInstanceUID, decides
which images belong together and leaves no trace (tables.Groups). What is recorded of a bad row is its place in the
table, never its content. A row whose words hold the patient's own name or number is a bad row.

Text that is burned into the pixels cannot be seen here. Files that declare it, and files of modalities where it is
common that do not deny it, are read, counted and named in the report: look at them before anyone else does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..images import BadImageError, ImageFile, read_image
from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .raw import image_columns, optional_text
from .tables import Groups, Record, file_name, find_tables, make_rows, note_unused, read_table, row_columns, row_id

NOT_SHOWN = "(not shown)"
OFTEN_BURNED_IN = {"", "US", "IVUS", "ES", "XC", "SC", "OT"}  # unknown, ultrasound, endoscopy, photographs, other
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # a screen of any modality; the class and, with more digits, its kinds
CODE = re.compile(r"[A-Z][A-Z0-9 _]{0,15}")  # a value of the header that may be one of its standard terms
IMAGES_KEPT = 8  # decoded, for rows in a row that ask about one file


@dataclass(frozen=True)
class DicomImage:
    """What rows about one file need to know."""

    image: ImageFile
    name: str  # after its content
    patient: str | None  # never leaves this module
    secrets: tuple[frozenset[str], ...]  # sets of words that together name the patient
    modality: str | None
    body_part: str | None


def read_dicom(
    root: Path, report: Report, languages: Sequence[str] = ("en",), *, license: str = "unknown"
) -> Iterator[Row]:
    """Yield the rows of all tables in `root`, in the order of the tables' names; SourceError if there is none.

    A row's `language` is the one in `languages`, or null if there are several. `license` is what the data's owner says.
    """
    tables = find_tables(root)
    try:
        import pydicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise SourceError("dicom: pydicom is not installed; pip install 'biod2c[dicom]'") from error
    files, groups, used, seen_ids = DicomFolder(root, report), Groups(), set[str](), set[str]()
    for table in tables:

        def dicom_row(record: Record, table: Path = table) -> Row:
            try:
                name = file_name(record, "image", report)
                used.add(name)
                file = files.read(name)
                columns = image_columns(file.name, file.image)
                columns |= row_columns(record, file.image, table, languages, report)
                columns["modality"] = columns["modality"] or file.modality
                columns["organ"] = columns["organ"] or file.body_part
                refuse_secrets(columns, file.secrets)
                columns["group"] = groups.of(optional_text(record, "group", report) or file.patient, file.image)
            except BadRowError as error:
                raise BadRowError(error.field, NOT_SHOWN, error.expected, error.what_to_do) from None
            return new_row(id=row_id("dicom", columns), source="dicom", license=license, **columns)

        yield from make_rows("dicom", table, report, read_table(table, report), dicom_row, seen_ids)
    files.report_at_end(len(groups))
    note_unused("dicom", root, used, report)


class DicomFolder:
    """The files of a folder as pictures; the last ones are kept, so that rows in order decode each file once."""

    def __init__(self, root: Path, report: Report) -> None:
        self.root, self.report = root, report
        self._read = lru_cache(maxsize=IMAGES_KEPT)(self._load)
        self._burned_in: dict[str, set[str]] = {"declare": set(), "do not deny": set()}
        self._many_frames: set[str] = set()
        self._studies: set[str] = set()

    def read(self, name: str) -> DicomImage:
        """The picture of a file; BadRowError if it is missing, outside the folder or does not decode."""
        file = self._read(name)
        if isinstance(file, BadRowError):
            raise file
        return file

    def _load(self, name: str) -> DicomImage | BadRowError:
        from .dicom_pixels import header_texts, read_header, read_picture

        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            return BadRowError("image", NOT_SHOWN, "a name inside the folder", "mend the row in the table")
        if not path.is_file():
            return BadRowError("image", NOT_SHOWN, "a DICOM file in the folder", "copy the file again")
        try:
            header = read_header(path)
            texts = header_texts(header)
            data, frames = read_picture(path, header)
            image = read_image(data)
        except BadImageError as error:
            return BadRowError(
                "image", NOT_SHOWN, f"a DICOM image that decodes ({error})", "mend or export the file again"
            )
        file = DicomImage(image, f"{image.sha256[:16]}.png", *_patient(texts), *_terms(texts))
        self._remember(file, texts, frames)
        return file

    def _remember(self, file: DicomImage, texts: Mapping[str, str], frames: int) -> None:
        self._studies.add(texts["StudyInstanceUID"])
        if frames > 1:
            self._many_frames.add(file.name)
        declared = texts["BurnedInAnnotation"].upper()
        captured = texts["SOPClassUID"].startswith(SECONDARY_CAPTURE)
        if declared == "YES":
            self._burned_in["declare"].add(file.name)
        elif declared != "NO" and (captured or (file.modality or "") in OFTEN_BURNED_IN):
            self._burned_in["do not deny"].add(file.name)

    def report_at_end(self, groups: int) -> None:
        """Count what was met, each image once, and warn."""
        if self._many_frames:
            self.report.quirks["dicom: several frames, the middle one taken"] += len(self._many_frames)
        for verb, found in self._burned_in.items():
            names = sorted(found)
            if names:
                self.report.quirks[f"dicom: images that {verb} burned-in text"] += len(names)
                self.report.notes.append(
                    f"dicom: WARNING, {len(names)} images {verb} burned-in text, which may name the patient; look at "
                    f"each before anyone else does: {', '.join(names[:10])}{' ...' if names[10:] else ''}"
                )
        if groups == 1 < len(self._studies):
            self.report.notes.append(
                f"dicom: {len(self._studies)} studies are of one patient, so no split can part them; if their "
                "PatientID is a placeholder, give the table a column `group`"
            )


def _patient(texts: Mapping[str, str]) -> tuple[str | None, tuple[frozenset[str], ...]]:
    """What tells the patient from others, and the sets of words that name them."""
    from .dicom_pixels import IDENTIFIERS

    patient, issuer, study = (texts[name] for name in ("PatientID", "IssuerOfPatientID", "StudyInstanceUID"))
    key = f"patient {issuer} {patient}" if patient else f"study {study}" if study else None
    spellings = [part for name in IDENTIFIERS for part in texts[name].split("=")]
    family_and_given = ["^".join(spelling.split("^")[:2]) for spelling in spellings]  # no titles, no middle names
    return key, tuple({words for words in map(words_of, family_and_given) if _telling(words)})


def words_of(value: str) -> frozenset[str]:
    """The words and numbers of a text, in lower case."""
    return frozenset(re.findall(r"[^\W_]+", value.casefold()))


def _telling(words: frozenset[str]) -> bool:
    """Whether words name one patient: a number of four digits and more, or family and given name together.

    Less would refuse every question about "the patient", the name in many files that were made anonymous.
    """
    has_number = any(sum(map(str.isdigit, word)) >= 4 for word in words)
    return has_number or sum(len(word) > 1 for word in words) >= 2


def _terms(texts: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Modality and BodyPartExamined, each None unless it can be a standard term."""
    values = (texts[name] for name in ("Modality", "BodyPartExamined"))
    modality, body_part = (value if CODE.fullmatch(value) else None for value in values)
    return modality, body_part


def refuse_secrets(columns: Row, secrets: Sequence[frozenset[str]]) -> None:
    """BadRowError if a text of the row, earlier turns included, holds a name or number of the patient."""
    texts = {name: value for name, value in columns.items() if isinstance(value, str)}
    texts["history"] = "\n".join(turn["content"] for turn in columns["history"])
    for name, value in texts.items():
        if any(secret <= words_of(value) for secret in secrets):
            raise BadRowError(name, NOT_SHOWN, "a text without the patient's name or number", "take it out")
