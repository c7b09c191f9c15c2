"""A plain folder of images with a table of questions beside them (tables.py): a hospital's or a laboratory's own data.

    figures/a.png        questions.csv:  image,question,answer,group
    figures/old/b.jpg                    figures/a.png,Is there an effusion?,No,P7

Columns: image (relative to the folder), question, answer; and, where there are any, answer_type, question_type, organ,
modality, caption, history, split, group (patient or study). RadFM's csv (Figure_path, Question, Answer) is such a
table. The names of the image files go into the dataset, so they must not name a patient; the values of `group` do not
(see tables.Groups).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..report import Report
from ..schema import Row, new_row
from .raw import ImageFolder, image_columns, optional_text
from .tables import Groups, Record, file_name, find_tables, make_rows, note_unused, read_table, row_columns, row_id


def read_folder(
    root: Path, report: Report, languages: Sequence[str] = ("en",), *, license: str = "unknown"
) -> Iterator[Row]:
    """Yield the rows of all tables in `root`, in the order of the tables' names; SourceError if there is none.

    A row's `language` is the one in `languages`, or null if there are several. `license` is what the data's owner says.
    """
    images, groups, used, seen_ids = ImageFolder(root, "image"), Groups(), set[str](), set[str]()
    for table in find_tables(root):

        def folder_row(record: Record, table: Path = table) -> Row:
            name = file_name(record, "image", report)
            used.add(name)
            image = images.read(name)
            columns = image_columns(name, image) | row_columns(record, image, table, languages, report)
            columns["group"] = groups.of(optional_text(record, "group", report), image)
            return new_row(id=row_id("folder", columns), source="folder", license=license, **columns)

        yield from make_rows("folder", table, report, read_table(table, report), folder_row, seen_ids)
    note_unused("folder", root, used, report)
