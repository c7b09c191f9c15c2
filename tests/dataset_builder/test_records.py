"""Tables and lists that are too large for memory: every record that can be read comes out, every other is reported."""

import json

import pytest

from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.sources import records
from biod2c.dataset_builder.sources.raw import text
from biod2c.dataset_builder.sources.records import Lookup, read_csv, read_jsonl, read_long_json_list


def read(reader, path, content, *columns):
    """(records, [(row, found)]) of a file with these bytes."""
    path.write_bytes(content)
    report = Report()
    arguments = (columns,) if columns else ()
    found = list(reader("source", path, report, *arguments))
    assert all(bad["file"] == path.name and bad["source"] == "source" for bad in report.bad_rows)
    return found, [(bad["row"], bad["expected"]) for bad in report.bad_rows]


def test_csv_fields_may_hold_commas_quotes_and_line_ends(tmp_path):
    content = '\ufeffindex,Caption\n1,"CT, ""axial"",\nof the chest"\r\n\n2,X-ray\n'.encode()
    rows, bad = read(read_csv, tmp_path / "a.csv", content, "Caption")
    assert rows == [
        (0, {"index": "1", "Caption": 'CT, "axial",\nof the chest'}),
        (1, {"index": "2", "Caption": "X-ray"}),
    ]
    assert bad == []


BROKEN_LINES = [
    '2,"never closed,b',  # the quote would swallow the rows up to the next one
    "2,too,many",
    "2",
    '2,"closed"too early',
]


@pytest.mark.parametrize("line", BROKEN_LINES)
@pytest.mark.parametrize("others", ["1,one\n{}\n3,three\n4,four\n", '1,"one"\n{}\n3,"three"\n4,"four"\n'])
def test_a_broken_csv_row_costs_only_itself(tmp_path, line, others):
    rows, bad = read(read_csv, tmp_path / "a.csv", b"index,word\n" + others.format(line).encode(), "word")
    assert [row["word"] for _, row in rows] == ["one", "three", "four"]
    assert [number for number, _ in bad] == [1]
    assert "2 fields" in bad[0][1]


def test_a_csv_row_longer_than_any_field_may_be_does_not_end_the_file(tmp_path):
    content = b'index,word\n1,"' + b"x,\n" * 50_000 + b"2,two\n"
    rows, bad = read(read_csv, tmp_path / "a.csv", content, "word")
    # "x," is a row of two fields: an unclosed quote says nothing about where it was meant to end
    assert rows[-1][1] == {"index": "2", "word": "two"}
    assert len(rows) + len(bad) == 50_001 and bad[0][0] == 0


@pytest.mark.parametrize("content", [b"", b"index,other\n1,2\n", b'"index\n'])
def test_a_csv_file_without_the_columns_is_an_error(tmp_path, content):
    with pytest.raises(SourceError, match=r"a\.csv: .*fetch the file again"):
        read(read_csv, tmp_path / "a.csv", content, "word")


@pytest.mark.parametrize(
    ("reader", "content"), [(read_csv, b"a,b\n1\n2\n"), (read_jsonl, b"\n{\n"), (read_long_json_list, b"[{1")]
)
def test_a_file_of_which_nothing_can_be_read_is_an_error(tmp_path, reader, content):
    with pytest.raises(SourceError, match="no row of it can be read"):
        read(reader, tmp_path / "a", content, *(["a"] if reader is read_csv else []))


def test_json_lines_that_are_broken_are_numbered(tmp_path):
    lines = [b'{"n": 1}', b'{"n": 2', b"", b"[" * 100_000, b'{"n": 3}', b'{"n": ']
    rows, bad = read(read_jsonl, tmp_path / "a.jsonl", b"\n".join(lines))
    assert rows == [(0, {"n": 1}), (3, {"n": 3})]
    assert [number for number, _ in bad] == [1, 2, 4]


@pytest.mark.parametrize("reader", [read_csv, read_jsonl])
def test_bytes_that_are_not_utf8_are_refused_where_they_matter(tmp_path, reader):
    word = b"caf\xe9"
    content = b"word\n" + word + b"\n" if reader is read_csv else b'{"word": "' + word + b'"}'
    [(_, row)], _ = read(reader, tmp_path / "a", content, *(["word"] if reader is read_csv else []))
    with pytest.raises(ValueError, match=r"word: .*expected a text in UTF-8"):
        text(row, "word", Report())


ITEMS = [{"id": str(n), "turns": [{"value": 'a "]" }, {' * n}], "other": [n, None, "é"]} for n in range(40)]


@pytest.mark.parametrize("chunk", [3, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_piece_by_piece_as_json_reads_it_whole(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", chunk)
    content = json.dumps(ITEMS, indent=indent, ensure_ascii=False).encode()
    assert read(read_long_json_list, tmp_path / "a.json", b"\xef\xbb\xbf " + content) == (list(enumerate(ITEMS)), [])
    numbers, bad = read(read_long_json_list, tmp_path / "a.json", b"[12, 345]")
    assert (numbers, bad) == ([(0, 12), (1, 345)], [])


@pytest.mark.parametrize("chunk", [5, 2**20])
def test_a_list_cut_anywhere_gives_the_records_before_the_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", chunk)
    content = json.dumps(ITEMS[:3]).encode()
    ends = [content.index(json.dumps(item).encode()) + len(json.dumps(item)) for item in ITEMS[:3]]
    for cut in range(ends[0], len(content)):
        rows, bad = read(read_long_json_list, tmp_path / "a.json", content[:cut])
        whole = sum(end <= cut for end in ends)
        assert rows == list(enumerate(ITEMS[:whole]))
        assert [number for number, _ in bad] == [whole]


def test_a_broken_record_in_a_list_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_CHARACTERS", 10)
    monkeypatch.setattr(records, "LONGEST_RECORD", 50)
    rows, [(number, expected)] = read(read_long_json_list, tmp_path / "a.json", b'[{"a": 1}, {"b": oops' + b" " * 1000)
    assert (rows, number) == ([(0, {"a": 1})], 1)
    assert "Expecting value" in expected


def test_a_json_file_that_is_no_list_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="expected one JSON list"):
        read(read_long_json_list, tmp_path / "a.json", b'{"a": 1}')


def test_a_lookup_gives_all_pairs_of_a_key_in_order():
    table = Lookup(("key" + str(n % 3), f"name{n}", f"text{n}") for n in range(9))
    assert table.find("key1") == [("name1", "text1"), ("name4", "text4"), ("name7", "text7")]
    assert table.find("none") == []
