"""A plain folder with tables: what people write, and what goes wrong in it."""

import json

import pytest
from datasets import load_dataset

from biod2c.cli import main
from biod2c.dataset_builder.recipe import RecipeError, read_recipe
from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.schema import FEATURES
from biod2c.dataset_builder.sources.folder import read_folder


@pytest.fixture
def folder(tmp_path, make_jpeg):
    """a.jpg, ward/b.jpg and ward/ct/c.jpg, and outside of the folder secret.jpg."""
    root = tmp_path / "own"
    (root / "ward" / "ct").mkdir(parents=True)
    for seed, name in enumerate(["a.jpg", "ward/b.jpg", "ward/ct/c.jpg", "../secret.jpg"]):
        (root / name).write_bytes(make_jpeg(seed))
    return root


def read(root, **options):
    report = Report()
    return list(read_folder(root, report, **options)), report


def write(root, text, name="table.csv", encoding="utf-8"):
    (root / name).write_bytes(text.encode(encoding))


FULL = """image,question,answer,answer_type,question_type,organ,modality,caption,history,split,group
a.jpg,"Is it, or not?",Yes,CLOSED,presence,Liver,CT,A liver.,,train,P1
ward\\b.jpg,Where?,Left,open,,,,,"[{""role"": ""user"", ""content"": ""What?""}]",val,P2
./ward/ct/c.jpg,How large?,,,,,,,,test,
ward/ct/c.jpg,How large?,3,,,,,,,test,
a.jpg,How old?,Old,,,,,,,,P2
"""


def test_every_column_reaches_its_place(folder, make_jpeg):
    write(folder, FULL)
    rows, report = read(folder, license="CC-BY-4.0")
    first, second, _, _ = rows
    assert all(row.keys() == FEATURES.keys() for row in rows)
    assert first["image"] == {"bytes": make_jpeg(0), "path": "a.jpg"}
    assert (first["question"], first["answer"], first["answer_type"]) == ("Is it, or not?", "Yes", "closed")
    assert [first[name] for name in ("question_type", "organ", "modality", "caption")] == [
        *("presence", "Liver", "CT", "A liver.")
    ]
    assert second["image_id"] == "ward/b.jpg" and second["history"] == [{"role": "user", "content": "What?"}]
    assert [row["source_split"] for row in rows] == ["train", "validation", "test", "train"]
    assert {(row["source"], row["license"], row["language"]) for row in rows} == {("folder", "CC-BY-4.0", "en")}
    assert [(bad["row"], bad["field"]) for bad in report.bad_rows] == [(2, "answer")]


def test_a_group_keeps_rows_together_and_its_value_stays_out(folder):
    write(folder, FULL)
    first, second, third, last = read(folder)[0]
    assert second["group"] == last["group"] != first["group"]
    assert third["group"] == third["image_sha256"]
    assert "P1" not in repr(first | {"image": None}) and "P2" not in repr(second | {"image": None})


@pytest.mark.parametrize("delimiter", ",;\t|")
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_save(folder, delimiter, mark, end):
    lines = ["Image, Question ,Answer,Room", "a.jpg,What is it?,Größe,7", ",,,", "", 'ward/b.jpg,"a ""b""?",c,8']
    write(folder, mark + end.join(line.replace(",", delimiter) for line in lines))
    rows, report = read(folder)
    assert [(row["question"], row["answer"]) for row in rows] == [("What is it?", "Größe"), ('a "b"?', "c")]
    assert report.quirks["table.csv: empty line left out"] == 2
    assert report.quirks["table.csv: byte order mark removed"] == bool(mark)
    assert report.notes == ["table.csv: columns room are not read"]


def test_jsonl_and_radfms_names_and_the_tables_name_as_split(folder):
    write(
        folder, '{"image": "a.jpg", "question": "One?", "answer": 1}\n\n{"image": "a.jpg", "question": "T', "val.jsonl"
    )
    write(folder, "img_root_dir,Figure_path,Question,Answer\n/data/radfm,ward/b.jpg,Two?,2\n", "test.csv")
    rows, report = read(folder)
    assert [(row["answer"], row["source_split"]) for row in rows] == [("2", "test"), ("1", "validation")]
    assert [(bad["file"], bad["row"], bad["field"]) for bad in report.bad_rows] == [("val.jsonl", 1, "row")]
    assert report.quirks["folder: file that no row asks about"] == 1


def test_a_caption_without_a_question_is_a_row_to_pretrain_on(folder):
    write(folder, 'image,caption\na.jpg,"A chest film, upright."\nward/b.jpg,\n')
    [row], report = read(folder)
    assert (row["answer"], row["caption"], row["question_type"]) == (*["A chest film, upright."] * 2, "caption")
    assert "image" in row["question"]
    assert (report.bad_rows[0]["row"], report.bad_rows[0]["expected"]) == (1, "a question, or a caption")


BAD_ROWS = {
    '"a.jpg,What?,A': "closed quotes",  # takes in all that follows
    'a.jpg,"What"?,A': "closed quotes",
    "a.jpg,What?,A,B": "3 cells",
    "a.jpg,What?": "3 cells",
    "../secret.jpg,What?,A": "a name inside own/",
    "/etc/passwd,What?,A": "a name inside own/",
    "gone.jpg,What?,A": "an image file in own/",
    "ward,What?,A": "an image file in own/",
    "a\0.jpg,What?,A": "without zero bytes",
    f"{'a' * 5000}.jpg,What?,A": "the name of a file",
    ",What?,A": "a text that is not empty",
    "table.csv,What?,A": "an image that decodes",
    "a.jpg,First?,Yes": "differs from all before",
}


@pytest.mark.parametrize("line", BAD_ROWS, ids=lambda line: line[:20].replace("\0", "NUL"))
def test_a_bad_row_is_recorded_and_the_others_stay(folder, line):
    write(folder, f"image,question,answer\na.jpg,First?,Yes\n{line}\nward/b.jpg,Last?,No\n")
    rows, report = read(folder)
    swallowed = line.startswith('"')
    assert [row["question"] for row in rows] == (["First?"] if swallowed else ["First?", "Last?"])
    [bad] = report.bad_rows
    assert bad["row"] == 1 and BAD_ROWS[line] in bad["expected"] and bad["what_to_do"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answer_type", "maybe"),
        ("split", "fold 1"),
        ("history", "What?"),
        ("history", [{"role": "system"}]),
        ("question", "half a \ud83d"),
    ],
)
def test_a_value_that_is_none_of_the_allowed(folder, field, value):
    row = {"image": "a.jpg", "question": "What?", "answer": "A", field: value}
    write(folder, json.dumps(row), "table.jsonl")
    rows, report = read(folder)
    assert rows == [] and report.bad_rows[0]["field"] == field


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    write(folder, "image,question,answer\nlink.jpg,What?,A\n")
    assert "inside" in read(folder)[1].bad_rows[0]["expected"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,question,answer\na.jpg,Größe?,A\n".encode("latin-1"), "byte 0xf6 in line 2 is not UTF-8"),
        ("image,question,answer\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"image:question:answer\na.jpg:What?:A\n", "no columns `image` and `question`.*commas, semicolons"),
        (b"a.jpg,What?,A\n", "no columns"),
        (b"", "no columns"),
        (b"image,question,answer,Answer\n", r"columns \['answer'\] come twice"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_error(folder, content, message):
    (folder / "table.csv").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(folder)


def test_ids_do_not_move_when_rows_are_added(folder):
    lines = ["a.jpg,What?,A", "ward/b.jpg,What?,A"]
    write(folder, "image,question,answer\n" + "\n".join(lines))
    before = [row["id"] for row in read(folder)[0]]
    write(folder, "image,question,answer\n" + "\n".join(["a.jpg,New?,A", *lines]))
    assert [row["id"] for row in read(folder)[0]][1:] == before


def test_the_command_and_the_recipe_name_the_licence(folder, tmp_path, capsys):
    write(folder, FULL)
    command = ["build", "ingest", "--data", str(folder), "--output", str(tmp_path / "out")]
    assert main([*command, "--source", "folder", "--license", "CC0-1.0"]) == 0
    assert load_dataset(str(tmp_path / "out"), "folder", split="test")["license"][:] == ["CC0-1.0"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license:\n- cc0-1.0\n" in card and "| a folder of images | CC0-1.0 |" in card
    assert main([*command, "--source", "slake", "--license", "CC0-1.0"]) == 2
    assert "slake has its own licence" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: {folder: {data: own, license: CC0-1.0}}")
    assert read_recipe(recipe).sources["folder"].own == {"license": "CC0-1.0"}
    for wrong in ("folder: {data: own, license: 3}", "slake: {data: own, license: CC0-1.0}"):
        recipe.write_text(f"sources: {{{wrong}}}")
        with pytest.raises(RecipeError, match="license"):
            read_recipe(recipe)
