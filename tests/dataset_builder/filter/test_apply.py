"""A filtered dataset: every row stays, each with its figure's score and verdict, also after a kill."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from biod2c.cli import main
from biod2c.dataset_builder.filter import apply
from biod2c.dataset_builder.filter.apply import FigureFilter, filter_dataset
from biod2c.dataset_builder.schema import FEATURES

NEW = ["filter_score", "filter_keep"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def filtered(dataset, trained, tmp_path_factory):
    return filter_dataset(dataset, trained[0], tmp_path_factory.mktemp("filtered") / "out")


def test_all_rows_are_there_and_only_the_verdict_is_new(filtered, dataset):
    for config in ("default", "other"):
        before, after = (load_dataset(str(folder), config) for folder in (dataset, filtered.output))
        assert before.keys() == after.keys()
        for split in before:
            assert after[split].features == FEATURES
            assert before[split].data.drop(NEW).combine_chunks() == after[split].data.drop(NEW).combine_chunks()


def test_verdicts_follow_the_threshold_and_mostly_the_truth(filtered, trained, figures):
    truth = {hashlib.sha256(data).hexdigest(): label == "clean" for data, label, _ in figures}
    rows = load_dataset(str(filtered.output), "other", split="train").select_columns(["image_sha256", *NEW])
    readable = [row for row in rows if row["image_sha256"] in truth]
    assert all(row["filter_keep"] == (row["filter_score"] >= trained[1]["threshold"]) for row in readable)
    assert sum(row["filter_keep"] == truth[row["image_sha256"]] for row in readable) / len(readable) > 0.85


def test_both_sides_and_the_unreadable_are_counted(filtered, figures):
    lines = [json.loads(line) for line in (filtered.output / "unreadable.jsonl").read_text().splitlines()]
    [broken] = lines
    assert "truncated" in broken["error"].lower()
    assert filtered.figures["unreadable"] == 1
    assert sum(filtered.figures.values()) == len({data for data, _, _ in figures}) + 1
    rows = [row for split in load_dataset(str(filtered.output), "other").values() for row in split.select_columns(NEW)]
    rows += list(load_dataset(str(filtered.output), "default", split="train").select_columns(NEW))
    assert filtered.rows == {
        "clean": sum(row["filter_keep"] is True for row in rows),
        "polluted": sum(row["filter_keep"] is False for row in rows),
        "unreadable": sum(row["filter_keep"] is None and row["filter_score"] is None for row in rows),
    }
    assert filtered.rows["unreadable"] == 2
    assert f"rows: {filtered.rows['clean']} clean" in (filtered.output / "README.md").read_text()


def test_a_filter_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    dataset, trained, filtered, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    encoded = []

    def counted(encoder, figures, shas, workers):
        for number, batch in enumerate(encode_figures(encoder, figures, shas, workers)):
            if stop and number == 2:
                raise KeyboardInterrupt
            encoded.extend(sha for sha, _ in batch)
            yield batch

    encode_figures = apply.encode_figures
    monkeypatch.setattr(apply, "encode_figures", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        filter_dataset(dataset, trained[0], output)
    [scores] = output.glob("scores-*.jsonl")
    scores.write_bytes(scores.read_bytes() + b'{"image_sha2')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop = False
        patch.setattr(apply, "_card", lambda *_: raise_interrupt())  # the files are written, the card is not
        filter_dataset(dataset, trained[0], output)
    assert filter_dataset(dataset, trained[0], output).figures == filtered.figures
    assert len(encoded) == len(set(encoded)) == sum(filtered.figures.values())  # no figure was scored twice
    ours, whole = contents(output), contents(filtered.output)
    assert {name: data for name, data in ours.items() if "scores" not in name} == {
        name: data for name, data in whole.items() if "scores" not in name
    }


def raise_interrupt():
    raise KeyboardInterrupt


def test_another_filter_gives_its_own_verdict_and_not_the_cached_one(dataset, trained, tmp_path):
    """Of two filters that differ in the threshold alone, one keeps every figure."""
    for threshold in (1.1, 0.0):
        folder = tmp_path / f"filter{threshold}"
        folder.mkdir()
        (folder / "head.safetensors").write_bytes((trained[0] / "head.safetensors").read_bytes())
        record = trained[1] | {"threshold": threshold}
        record["sha256"] = apply.filter_digest(folder, record)
        (folder / "filter.json").write_text(json.dumps(record))
        filter_dataset(dataset, folder, tmp_path / "out")
        kept = load_dataset(str(tmp_path / "out"), "default", split="train")["filter_keep"]
        assert set(kept) == {threshold == 0}


def test_the_command_says_how_many_fall_on_each_side(dataset, trained, filtered, tmp_path, capsys):
    command = ["build", "filter", str(dataset), "--filter", str(trained[0]), "--output", str(tmp_path / "out")]
    assert main([*command, "--workers", "1"]) == 0
    clean, polluted, _ = filtered.figures.values()
    assert f"figures: {clean} clean, {polluted} polluted, 1 unreadable" in capsys.readouterr().out


def test_the_files_keep_images_once_and_their_sizes_are_on_the_card(dataset, filtered):
    for path in dataset.rglob("*.parquet"):
        written = filtered.output / path.relative_to(dataset)
        assert written.stat().st_size < 1.1 * path.stat().st_size
        assert pq.read_metadata(written).num_rows == pq.read_metadata(path).num_rows
    info = load_dataset(str(filtered.output), "default", split="train").info
    assert info.download_size == (filtered.output / "data/default/train-00000.parquet").stat().st_size


def test_what_does_not_belong_together_is_one_line(dataset, trained, tmp_path, encoder, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "head.safetensors").write_bytes((trained[0] / "head.safetensors").read_bytes())
    (changed / "filter.json").write_text(json.dumps(trained[1] | {"threshold": 0.1}))
    other = tmp_path / "other"
    other.mkdir()
    for path in encoder.iterdir():
        (other / path.name).write_bytes(path.read_bytes().replace(b'"projection_dim": 128', b'"projection_dim":  128'))
    command = ["build", "filter", "--output", str(tmp_path / "out"), "--filter"]
    assert main([*command, str(changed), str(dataset)]) == 2
    assert main([*command, str(trained[0]), "--encoder", str(other), str(dataset)]) == 2
    assert main([*command, str(trained[0]), str(tmp_path)]) == 2
    assert main([*command[:2], "--output", str(other), "--filter", str(trained[0]), str(dataset)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("biod2c build: ")]
    for line, message in zip(
        lines,
        ("do not belong together", "not the encoder", "holds no Parquet file", "not empty and not written"),
        strict=True,
    ):
        assert message in line


def test_a_threshold_decides_only_what_has_a_score(trained):
    figure_filter = FigureFilter(trained[0])
    assert figure_filter.keeps(None) is None
    assert figure_filter.keeps(figure_filter.threshold) is True
