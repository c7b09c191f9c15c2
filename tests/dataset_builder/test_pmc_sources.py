"""PMC-VQA, PMC-OA and LLaVA-Med in small folders of their raw layouts; the figures are crops of real medical images."""

import csv
import io
import json
import tarfile
import zipfile

import pytest
from datasets import load_dataset
from PIL import Image

from biod2c.cli import main
from biod2c.dataset_builder.captions import INSTRUCTIONS
from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.schema import FEATURES
from biod2c.dataset_builder.sources.llava_med import read_llava_med
from biod2c.dataset_builder.sources.pmc_oa import ZIPPED_FOLDER, read_pmc_oa
from biod2c.dataset_builder.sources.pmc_vqa import read_pmc_vqa

V1 = ["Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in "ABCD"), "Answer_label"]
V2 = ["index", "Figure_path", "Caption", "Question", *(f"Choice {letter}" for letter in "ABCD"), "Answer", "split"]
CHOICES = [" A:CT ", " B: Ultrasound", "C:MRI", " D:X-ray "]


@pytest.fixture(scope="session")
def figures(examples):
    """Bytes of the JPEG files of eight crops."""
    crops = []
    for path in sorted((examples / "slake" / "imgs").glob("*/source.jpg"))[:8]:
        stream = io.BytesIO()
        Image.open(path).convert("RGB").crop((60, 60, 140, 150)).save(stream, "JPEG")
        crops.append(stream.getvalue())
    return crops


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_csv(path, columns, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(reader, root):
    report = Report()
    rows = list(reader(root, report))
    assert all(row.keys() == FEATURES.keys() for row in rows)
    return rows, report


def skipped(report):
    return [(bad["file"], bad["row"], bad["field"]) for bad in report.bad_rows]


@pytest.fixture
def pmc_vqa(tmp_path, figures):
    """Both versions, with PMC-OA's table beside them."""
    root = tmp_path / "pmc_vqa"
    root.mkdir()
    names = ["PMC11_Fig1", "PMC11_Fig2", "PMC22_F1", "PMC33_Fig1"]
    write_zip(root / "images.zip", {f"images/{n}.jpg": data for n, data in zip(names, figures, strict=False)})
    write_zip(root / "images_2.zip", {"figures/PMC11_Fig1_4.jpg": figures[4], "figures/PMC44_Fig1_0.jpg": figures[5]})
    first = ["PMC11_Fig1.jpg", " What scan is it?", " MRI ", *CHOICES, "C"]
    write_csv(root / "train.csv", V1, first, ["PMC22_F1.jpg", "Which scan?", "CT", *CHOICES, "A"])
    checked = ["PMC33_Fig1.jpg", "Which?", "X-ray", *CHOICES, "D"]
    write_csv(root / "test_clean.csv", V1, checked)
    write_csv(root / "test.csv", V1, ["PMC11_Fig2.jpg", "Which?", "CT", *CHOICES, "A"], checked)
    caption = "A CT,\nof the chest."
    write_csv(root / "train_2.csv", V2, [35, "PMC11_Fig1_4.jpg", caption, "Which?", *CHOICES, "A", "train"])
    write_csv(root / "test_2.csv", V2, [9, "PMC44_Fig1_0.jpg", "", "Which?", *CHOICES, " B ", "test"])
    write_jsonl(
        root / "pmc_oa.jsonl",
        {"image": "PMC11_Fig1_0.jpg", "caption": "(A) Axial MRI."},
        {"image": "PMC22_F1.jpg", "caption": "Chest CT."},
        {"image": "PMC11_Fig1_1.jpg", "caption": "(B) Coronal MRI."},
        {"image": "PMC11_Fig1_2.jpg", "caption": "(A) Axial MRI."},
        {"image": "PMC11_Fig10_1.jpg", "caption": "Another figure."},
    )
    return root


def test_pmc_vqa_resolves_letters_captions_papers_and_splits(pmc_vqa, figures):
    rows, report = read(read_pmc_vqa, pmc_vqa)
    assert [(row["id"], row["source_split"], row["answer"], row["caption"], row["group"]) for row in rows] == [
        ("pmc_vqa-train-0", "train", "MRI", "(A) Axial MRI. (B) Coronal MRI.", "PMC11"),
        ("pmc_vqa-train-1", "train", "CT", "Chest CT.", "PMC22"),
        ("pmc_vqa-test_clean-0", "test", "X-ray", None, "PMC33"),
        ("pmc_vqa-test-0", "test", "CT", None, "PMC11"),
        ("pmc_vqa-train_2-35", "train", "CT", "A CT, of the chest.", "PMC11"),
        ("pmc_vqa-test_2-9", "test", "Ultrasound", None, "PMC44"),
    ]
    assert rows[0]["question"] == "What scan is it?"
    assert {(row["answer_type"], row["license"], row["language"]) for row in rows} == {(None, "CC-BY-SA-4.0", "en")}
    assert [row["image"]["bytes"] for row in rows] == [figures[n] for n in (0, 2, 3, 1, 4, 5)]
    assert report.bad_rows == []
    assert report.quirks["pmc_vqa: row of test.csv left out, test_clean.csv has it"] == 1
    assert report.quirks["pmc_vqa: row of version 1 whose caption is PMC-OA's"] == 2
    assert report.quirks["pmc_vqa: row of version 1 without a caption, its figure is not in PMC-OA"] == 2
    assert report.quirks["pmc_vqa: row of version 2 without a caption"] == 1


def test_pmc_vqa_prefers_whole_captions_and_does_without_pmc_oa(pmc_vqa):
    write_jsonl(
        pmc_vqa / "pmc_oa_beta.jsonl",
        *({"image": f"PMC11_Fig1_{n}.jpg", "caption": "Brain MRI. (A) Axial. (B) Coronal."} for n in range(3)),
        {"image": "PMC22_F1_0.jpg", "caption": ""},
    )
    rows, report = read(read_pmc_vqa, pmc_vqa)
    assert [row["caption"] for row in rows[:2]] == ["Brain MRI. (A) Axial. (B) Coronal.", None]
    assert skipped(report) == [("pmc_oa_beta.jsonl", 3, "caption")]
    (pmc_vqa / "pmc_oa.jsonl").unlink()
    (pmc_vqa / "pmc_oa_beta.jsonl").unlink()
    for name in ("test.csv", "train_2.csv", "test_2.csv", "images_2.zip"):
        (pmc_vqa / name).unlink()
    rows, report = read(read_pmc_vqa, pmc_vqa)
    assert [row["caption"] for row in rows] == [None] * 3
    assert report.notes == [
        "pmc_vqa: no test.csv",
        "pmc_vqa: no pmc_oa_beta.jsonl or pmc_oa.jsonl in this folder, so version 1 has no captions",
    ]


def test_pmc_vqas_older_layout(pmc_vqa):
    old = ["Anwser" if name == "Answer" else name for name in V1]
    row = ["PMC11_Fig1.jpg", "Which?", "MRI of the knee", *CHOICES]
    write_csv(pmc_vqa / "train.csv", old[:-1], row)
    write_csv(pmc_vqa / "test.csv", old, [*row, "C"], [*row[:2], "", *CHOICES, "B"])
    rows, report = read(read_pmc_vqa, pmc_vqa)
    assert [row["answer"] for row in rows if row["id"].startswith(("pmc_vqa-train-", "pmc_vqa-test-"))] == [
        "MRI of the knee",
        "MRI",
        "Ultrasound",
    ]
    assert report.quirks["pmc_vqa: the answer's column is spelt Anwser"] == 3
    assert report.quirks["pmc_vqa: row without the right choice's letter, its answer kept as worded"] == 1
    assert report.quirks["pmc_vqa: answer differs from the choice that its letter names, the choice kept"] == 1


def test_pmc_vqas_faults_are_recorded_and_nothing_else_is_lost(pmc_vqa, figures):
    members = {"images/PMC1_Fig1.jpg": figures[0], "images/PMC2_Fig1.jpg": figures[1][:-200]}
    write_zip(pmc_vqa / "images.zip", {**members, "../PMC3_Fig1.jpg": figures[2]})
    names = ["PMC1_Fig1", "PMC2_Fig1", "PMC3_Fig1", "PMC4_Fig1", "../PMC1_Fig1"]
    rows = [[f"{name}.jpg", "Which?", "CT", *CHOICES, "A"] for name in names]
    broken = [["PMC1_Fig1.jpg", "Which?", "CT"], ["PMC1_Fig1.jpg", "", "CT", *CHOICES, "A"]]
    empty = ["PMC1_Fig1.jpg", "Which?", "", "A:", *CHOICES[1:], "A"]
    write_csv(pmc_vqa / "train.csv", V1, *rows, *broken, empty, rows[0])
    read_rows, report = read(read_pmc_vqa, pmc_vqa)
    assert [row["id"] for row in read_rows if "-train-" in row["id"]] == ["pmc_vqa-train-0", "pmc_vqa-train-8"]
    of_train = [(row, field) for file, row, field in skipped(report) if file == "train.csv"]
    fields = [*["Figure_path"] * 4, "row", "Question", "Choice A"]
    assert of_train == list(enumerate(fields, start=1))
    assert {bad["field"] for bad in report.bad_rows if bad["file"] != "train.csv"} == {"Figure_path"}


@pytest.fixture
def pmc_oa(tmp_path, figures):
    root = tmp_path / "pmc_oa"
    root.mkdir()
    names = ["PMC11_Fig1_0.jpg", "PMC11_Fig1_1.jpg", "PMC22_F1_0.jpg"]
    write_zip(root / "images.zip", {f"{ZIPPED_FOLDER}/{n}": data for n, data in zip(names, figures, strict=False)})
    rows = [{"image": name, "caption": f" Part {n}\nof it. ", "alignment_score": 0.5} for n, name in enumerate(names)]
    write_jsonl(root / "pmc_oa.jsonl", *rows)
    return root


def test_pmc_oa_gives_instructions_and_captions(pmc_oa, figures):
    rows, report = read(read_pmc_oa, pmc_oa)
    assert [(row["id"], row["answer"], row["caption"], row["group"]) for row in rows] == [
        ("pmc_oa-PMC11_Fig1_0", "Part 0 of it.", "Part 0 of it.", "PMC11"),
        ("pmc_oa-PMC11_Fig1_1", "Part 1 of it.", "Part 1 of it.", "PMC11"),
        ("pmc_oa-PMC22_F1_0", "Part 2 of it.", "Part 2 of it.", "PMC22"),
    ]
    assert all(row["question"] in INSTRUCTIONS["caption"] and row["question_type"] == "caption" for row in rows)
    assert [row["image"]["bytes"] for row in rows] == figures[:3]
    assert {(row["source_split"], row["license"]) for row in rows} == {("train", "per article")}
    assert read(read_pmc_oa, pmc_oa)[0] == rows
    assert report.bad_rows == []


def test_pmc_oas_older_table_and_pmcs_list_of_licences(pmc_oa):
    older = {"image": "PMC11_Fig1_0.jpg", "caption": "Old.", "pmcid": "PMC99", "url_name": "https://example.org/a.jpg"}
    write_jsonl(pmc_oa / "pmc_oa.jsonl", older, {"image": "PMC22_F1_0.jpg", "caption": "New."})
    write_jsonl(pmc_oa / "pmc_oa_beta.jsonl", older)
    columns = ["File", "Article Citation", "Accession ID", "Last Updated (YYYY-MM-DD HH:MM:SS)", "PMID", "License"]
    write_csv(pmc_oa / "oa_file_list.csv", columns, ["a.tar.gz", "J. A, 1", "PMC99", "2022-01-01", "1", "CC BY"])
    rows, report = read(read_pmc_oa, pmc_oa)
    assert [(row["group"], row["license"]) for row in rows] == [("PMC99", "CC BY"), ("PMC22", "per article")]
    assert report.notes == ["pmc_oa: pmc_oa_beta.jsonl not read, pmc_oa.jsonl is"]


def test_pmc_oas_faults_are_recorded_and_nothing_else_is_lost(pmc_oa):
    lines = [
        '{"image": "PMC11_Fig1_0.jpg", "caption": ""}',
        '{"image": "PMC11_Fig1_0.jpg", "caption": "One."}',
        '{"image": "PMC11_Fig1_0.jpg", "caption": "Again."}',
        '{"image": "PMC11_Fig9_0.jpg", "caption": "Missing."}',
        '{"image": "PMC22_F1_0.jpg", "caption": "Caf\xe9"}',
        '["no", "object"]',
        '{"image": "PMC11_Fig1_1.jpg", "caption": "Two."}',
        '{"image": "PMC22_F1_0.jpg", "capt',
    ]
    (pmc_oa / "pmc_oa.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    rows, report = read(read_pmc_oa, pmc_oa)
    assert [row["answer"] for row in rows] == ["One.", "Two."]
    fields = ["caption", "image", "image", "caption", "row", "row"]
    assert skipped(report) == [("pmc_oa.jsonl", n, field) for n, field in zip((0, 2, 3, 4, 5, 7), fields, strict=True)]


def llava_row(name, key="conversatons", question="Describe it.\n<image>", answer="A brain."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{name}.jpg", key: turns}


@pytest.fixture
def llava_med(tmp_path, figures):
    """Three figures: in a packed package, in an unpacked one, in images/."""
    root = tmp_path / "llava_med"
    (root / "pmc_articles/PMC22").mkdir(parents=True)
    (root / "images").mkdir()
    with tarfile.open(root / "pmc_articles/PMC11.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("PMC11/j-f1.jpg")
        member.size = len(figures[0])
        archive.addfile(member, io.BytesIO(figures[0]))
    (root / "pmc_articles/PMC22/j-f1.jpg").write_bytes(figures[1])
    (root / "images/33_F1.jpg").write_bytes(figures[2])
    rows = [
        llava_row("11_F1"),
        llava_row("22_F1", "conversations", "<image>\nWhat is it?"),
        llava_row("33_F1", answer="A liver. "),
    ]
    (root / "alignment_500k.json").write_text(json.dumps(rows))
    write_jsonl(
        root / "llava_med_image_urls.jsonl",
        *(
            {
                "pair_id": f"{n}_F1",
                "pmc_tar_url": f"https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/aa/bb/PMC{n}.tar.gz",
                "image_file_path": f"PMC{n}/j-f1.jpg",
            }
            for n in (11, 22, 33, 44)
        ),
    )
    return root


def test_llava_med_finds_its_figures_and_its_instructions(llava_med, figures):
    rows, report = read(read_llava_med, llava_med)
    assert [(row["id"], row["question"], row["answer"], row["group"]) for row in rows] == [
        ("llava_med-11_F1", "Describe it.", "A brain.", "PMC11"),
        ("llava_med-22_F1", "What is it?", "A brain.", "PMC22"),
        ("llava_med-33_F1", "Describe it.", "A liver.", "PMC33"),
    ]
    assert [row["image"]["bytes"] for row in rows] == figures[:3]
    assert [row["caption"] for row in rows] == [row["answer"] for row in rows]
    assert {(row["license"], row["question_type"], row["source_split"]) for row in rows} == {
        ("CC-BY-NC-4.0", "caption", "train")
    }
    assert report.bad_rows == [] and report.notes == []


def test_llava_meds_longer_dialogues_keep_their_turns(llava_med):
    row = llava_row("11_F1")
    row["conversatons"] += [{"from": "human", "value": "Any lesion?"}, {"from": "gpt", "value": "None."}]
    (llava_med / "alignment_500k.json").write_text(json.dumps([row]))
    [read_row], _ = read(read_llava_med, llava_med)
    assert (read_row["question"], read_row["answer"], read_row["caption"]) == ("Any lesion?", "None.", None)
    assert read_row["history"] == [
        {"role": "user", "content": "Describe it."},
        {"role": "assistant", "content": "A brain."},
    ]


def test_llava_med_without_places_reads_images_alone(llava_med):
    (llava_med / "llava_med_image_urls.jsonl").unlink()
    rows, report = read(read_llava_med, llava_med)
    assert [(row["id"], row["group"]) for row in rows] == [("llava_med-33_F1", rows[0]["image_sha256"])]
    assert [field for _, _, field in skipped(report)] == ["image", "image"]
    assert report.quirks["figure of an unknown paper: it is a group of its own"] == 1
    for path in (llava_med / "images").iterdir():
        path.unlink()
    (llava_med / "images").rmdir()
    with pytest.raises(SourceError, match="no figures; expected"):
        read(read_llava_med, llava_med)


def test_llava_meds_faults_are_recorded_and_nothing_else_is_lost(llava_med):
    silent = llava_row("33_F1")
    silent["conversatons"] = silent["conversatons"][:1]
    rows = [
        llava_row("11_F1", answer=" "),
        llava_row("44_F1"),  # its package is not there
        llava_row("55_F1"),  # nor its place
        llava_row("../images/33_F1"),
        silent,
        {"id": "6", "image": "33_F1.jpg", "conversatons": "none"},
        llava_row("11_F1"),
        llava_row("11_F1"),
        llava_row("33_F1"),
        llava_row("22_F1"),
    ]
    content = json.dumps(rows)
    (llava_med / "alignment_500k.json").write_text(content[:-40])
    package = (llava_med / "pmc_articles/PMC11.tar.gz").read_bytes()
    read_rows, report = read(read_llava_med, llava_med)
    assert [row["id"] for row in read_rows] == ["llava_med-11_F1", "llava_med-33_F1"]
    fields = ["value", "image", "image", "image", "conversatons", "conversatons", "id", "row"]
    assert skipped(report) == [
        ("alignment_500k.json", n, field) for n, field in zip((0, 1, 2, 3, 4, 5, 7, 9), fields, strict=True)
    ]
    (llava_med / "pmc_articles/PMC11.tar.gz").write_bytes(package[:-100])
    read_rows, report = read(read_llava_med, llava_med)
    assert [row["id"] for row in read_rows] == ["llava_med-33_F1"]
    assert "pmc_articles/PMC11.tar.gz (Compressed file ended" in report.bad_rows[-2]["expected"]


@pytest.mark.parametrize("source", ["pmc_vqa", "pmc_oa", "llava_med"])
def test_ingest_gives_a_dataset(request, source, tmp_path):
    root = request.getfixturevalue(source)
    arguments = ["--source", source, "--data", str(root), "--output", str(tmp_path / "out")]
    assert main(["build", "ingest", *arguments]) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows.num_rows == 3 and rows[0]["image"].size == (80, 90)
