"""BioVGQ as its authors released it: train.jsonl, val.jsonl, test.jsonl with rows {image, question, answer, queue}.

`queue` is null or a text of at most 10 phrases with commas between. Images lie beside the tables or in images/. Their
release carries one licence, but its images come from PubMed Central, SLAKE, VQA-RAD and Path-VQA, which keep theirs,
and a row does not say which is whose.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .raw import ImageFolder, image_columns, text
from .tables import Record, file_name, make_rows, read_table, split

LICENSE = "LicenseRef-mixed"
LONGEST_QUEUE = 30  # texts


def read_biovgq(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield the rows of every .jsonl file in `root`, in the order of the files' names, which say the split.

    SourceError if there is none, or without "en". A row's id is its file's name and line.
    """
    if "en" not in languages:
        raise SourceError(f"biovgq: languages {list(languages)} asked for, but BioVGQ has English rows only")
    tables = sorted(root.glob("*.jsonl"))
    if not tables:
        raise SourceError(f"{root}: no BioVGQ file; expected train.jsonl, val.jsonl or test.jsonl in this folder")
    images = ImageFolder(root, "image")
    for table in tables:
        numbered = enumerate(read_table(table, report))
        records = (record if isinstance(record, BadRowError) else {**record, "line": n} for n, record in numbered)

        def biovgq_row(record: Record, table: Path = table) -> Row:
            name = file_name(record, "image", report)
            image = images.read(name if (root / name).is_file() else f"images/{name}")
            answer = text(record, "answer", report)
            return new_row(
                id=f"biovgq-{table.stem}-{record['line']}",
                question=text(record, "question", report),
                answer=answer,
                queue=queue(record, answer, report),
                language="en",
                source="biovgq",
                source_split=split(record, table),
                license=LICENSE,
                **image_columns(name, image),
            )

        yield from make_rows("biovgq", table, report, records, biovgq_row, set())


def queue(record: Record, answer: str, report: Report) -> list[str]:
    """The phrases of `queue`, each once, without the row's own answer. BadRowError unless it is a text or null."""
    joined = record.get("queue")
    if joined is not None and not isinstance(joined, str):
        raise BadRowError("queue", joined, "phrases with commas between, or null", "mend the row in the file")
    phrases = list(dict.fromkeys(phrase.strip() for phrase in (joined or "").split(",") if phrase.strip()))
    others = [phrase for phrase in phrases if phrase.casefold() != answer.casefold()]
    if len(others) < len(phrases):
        report.quirks["biovgq: the row's own answer taken out of its queue"] += 1
    return others[:LONGEST_QUEUE]
