"""Path-VQA's folders and pickles, and pickles that would run a program."""

import copyreg
import pickle
import pickletools
import subprocess
import sys

import pytest

from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.schema import FEATURES
from biod2c.dataset_builder.sources.path_vqa import INSTRUCTIONS, load_plain_pickle, read_path_vqa


@pytest.fixture
def make_path_vqa(tmp_path, make_jpeg):
    """A folder `pvqa` with these rows by split; each split's folder holds its own two images."""

    def make(splits, protocol=pickle.DEFAULT_PROTOCOL):
        root = tmp_path / "pvqa"
        for seed, split in enumerate(splits):
            (root / "images" / split).mkdir(parents=True)
            (root / "qas" / split).mkdir(parents=True)
            for number in range(2):
                (root / "images" / split / f"{split}_{number:04}.jpg").write_bytes(make_jpeg(10 * seed + number))
            (root / "qas" / split / f"{split}_qa.pkl").write_bytes(pickle.dumps(splits[split], protocol))
        return root

    return make


def pair(image, question="what is seen?", answer="bone"):
    return {"image": image, "question": question, "answer": answer}


def test_rows_of_all_splits(make_path_vqa, make_jpeg):
    splits = {
        name: [pair(f"{name}_0001"), pair(f"{name}_0000", "is it, π?", "yes")] for name in ("train", "val", "test")
    }
    root = make_path_vqa(splits)
    report = Report()
    rows = list(read_path_vqa(root.parent, report))
    assert rows == list(read_path_vqa(root, Report()))
    assert rows[0].keys() == FEATURES.keys()
    assert rows[0]["image"] == {"bytes": make_jpeg(1), "path": "train/train_0001.jpg"}
    assert [row["source_split"] for row in rows] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert (rows[3]["id"], rows[3]["question"], rows[3]["answer_type"]) == ("path_vqa-val-1", "is it, π?", None)
    assert report.bad_rows == [] and report.notes == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_reads(make_path_vqa, protocol):
    rows = [pair("train_0000", f"{n}: é 漢?", "x" * n) for n in range(0, 1200, 299)]
    root = make_path_vqa({"train": rows}, protocol)
    assert load_plain_pickle(root / "qas/train/train_qa.pkl") == rows


def test_bad_rows_and_missing_splits(make_path_vqa):
    number = {"image": "train_0000", "question": "how many?"}
    rows = [pair("train_0000"), pair("train_0009"), pair("../../../x"), number, ["a"], pair("train_0001", answer="")]
    report = Report()
    assert len(list(read_path_vqa(make_path_vqa({"train": rows}), report))) == 1
    assert [(bad["row"], bad["field"]) for bad in report.bad_rows] == [
        *[(1, "image"), (2, "image"), (3, "row"), (4, "row"), (5, "answer")]
    ]
    assert report.notes == [
        "path_vqa: no val_qa.pkl, so no validation split",
        "path_vqa: no test_qa.pkl, so no test split",
    ]


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def by_instance(path):
    """Protocol 0's INST, which calls a function without REDUCE."""
    return b"(S'touch " + str(path).encode() + b"'\nios\nsystem\n."


def by_extension(path):
    """EXT1, which imports through a registry of codes; 240 is for private use."""
    copyreg.add_extension("os", "system", 240)
    return b"\x82\xf0(X" + len(f"touch {path}").to_bytes(4, "little") + f"touch {path}".encode() + b"tR."


HOSTILE = {
    "reduce": lambda path: pickle.dumps(Hostile(path)),
    "in a row": lambda path: pickle.dumps([{"image": "a", "question": Hostile(path), "answer": "b"}]),
    "old": lambda path: pickle.dumps([Hostile(path)], 0),
    "instance": by_instance,
    "extension": by_extension,
}


@pytest.mark.parametrize("way", HOSTILE)
def test_a_hostile_pickle_does_not_run(make_path_vqa, tmp_path, way):
    root, marker = make_path_vqa({"train": []}), tmp_path / "it ran".replace(" ", "_")
    path = root / "qas/train/train_qa.pkl"
    path.write_bytes(HOSTILE[way](marker))
    try:
        with pytest.raises(SourceError, match=r"train_qa.pkl: not a whole pickle.*nothing in it was run"):
            list(read_path_vqa(root, Report()))
        assert not marker.exists()
        pickle.loads(path.read_bytes())  # Python's own does run it: the file is as hostile as it looks
        assert marker.exists()
    finally:
        if way == "extension":
            copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("value", [1, 1.5, None, True, b"x", ("a",), {"a"}, bytearray(b"x"), pytest, int])
def test_anything_but_lists_dictionaries_and_strings_is_refused(tmp_path, value):
    path = tmp_path / "a.pkl"
    if value is pytest:
        path.write_bytes(b"\x80\x04P1\n.")  # a persistent id
    else:
        path.write_bytes(pickle.dumps([value]))
    with pytest.raises(SourceError, match="lists, dictionaries and strings only"):
        load_plain_pickle(path)


def test_the_instructions_allowed_make_nothing_else():
    kinds = {opcode.code: opcode for opcode in pickletools.opcodes}
    allowed = [kinds[code.decode("latin-1")] for code in INSTRUCTIONS]
    made = {kind.name for opcode in allowed for kind in opcode.stack_after}
    assert made <= {"list", "dict", "str", "mark", "any"}  # any: what GET finds in the memo


def test_a_cut_pickle_and_other_bytes(make_path_vqa):
    path = make_path_vqa({"train": [pair("train_0000")]}) / "qas/train/train_qa.pkl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            load_plain_pickle(path)
    path.write_bytes(pickle.dumps({"a": "b"}))
    with pytest.raises(SourceError, match="holds a dict, expected one list"):
        load_plain_pickle(path)


def test_a_small_pickle_cannot_ask_for_much_memory(tmp_path):
    """Python's C unpickler makes room for 2**31 memo entries on these six bytes, and fills it."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"]r\xff\xff\xff\x7f.")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from biod2c.dataset_builder.sources.path_vqa import load_plain_pickle\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert load_plain_pickle(Path(sys.argv[1])) == []\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
