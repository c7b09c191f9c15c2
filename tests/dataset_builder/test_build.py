"""Whole builds: what load_dataset opens, the cache trap, same bytes, builds that are killed, recipes that cannot
run.
"""

import json
import os
import subprocess
import sys

import pytest
import yaml
from datasets import load_dataset

from biod2c.cli import main
from biod2c.dataset_builder.build import build, default_splits
from biod2c.dataset_builder.recipe import Recipe, RecipeError, SourceOptions, read_recipe
from biod2c.dataset_builder.schema import FEATURES


def contents(folder):
    """{relative name: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def small_recipe(tmp_path, make_slake, slake_row, make_rad, rad_row):
    """A recipe file over a SLAKE and a VQA-RAD folder of a few rows."""
    make_slake(
        {"train.json": [slake_row(1), slake_row(2, image=2)], "validate.json": [slake_row(3, image=3)]},
        {1: [{"Liver": [2, 10, 10, 10]}], 3: [{"Heart": [20, 10, 10, 10]}]},
    )
    make_rad([rad_row(n, image=n // 2) for n in range(40)])
    recipe = {
        "output": "biovgq",
        "sources": {"slake": {"data": "slake"}, "vqa_rad": {"data": "vqa_rad"}},
        "captions": ["slake"],
        "queue": {"size": 10, "from_caption": 5},
        "default": {"slake": "official", "vqa_rad": 0.5},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_load_dataset_opens_every_configuration(demo):
    assert demo.rows == {
        config: {split: len(rows) for split, rows in load_dataset(str(demo.output), config).items()}
        for config in ("default", "pretrain", "slake", "vqa_rad")
    }
    assert demo.rows["slake"] == {"train": 4919, "validation": 1053}
    assert demo.rows["vqa_rad"] == {"train": 1797}
    # All of both sources but SLAKE's row without an answer and those about images that are like held-out ones.
    assert sum(demo.rows["default"].values()) == 4919 + 1053 + 1797 - 1 - 880
    assert demo.rows["pretrain"]["train"] > 3 * 450


def test_images_open_and_columns_are_the_schemas(demo, examples):
    rows = load_dataset(str(demo.output), split="train")
    assert rows.features == FEATURES
    assert rows[0]["image"].size == (256, 256)
    assert load_dataset(str(demo.output), "pretrain", split="train[:1]")[0]["question_type"] == "caption"
    first = next(iter(load_dataset(str(demo.output), split="validation", streaming=True)))
    assert first["image_id"] == "xmlab0/source.jpg" and first["image"].size == (256, 256)


def test_the_mixture_keeps_slakes_splits_and_divides_vqa_rad_by_image(demo):
    splits = load_dataset(str(demo.output)).remove_columns("image")
    for split, rows in splits.items():
        slake = [row for row in rows if row["source"] == "slake"]
        assert {row["source_split"] for row in slake} == {split}
    groups = {split: {row["group"] for row in rows if row["source"] == "vqa_rad"} for split, rows in splits.items()}
    assert not groups["train"] & groups["validation"]
    assert 0.15 < len(groups["validation"]) / (len(groups["train"]) + len(groups["validation"])) < 0.25
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_the_command_gives_the_same_bytes_and_then_nothing_to_do(demo, demo_recipe, tmp_path):
    command = [sys.executable, "-m", "biod2c.dataset_builder", "all", str(demo_recipe), "--output", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "built" in first.stdout and "train   5" in first.stdout
    assert contents(tmp_path / "x") == contents(demo.output)
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert second.stdout.startswith("nothing has changed")


def test_a_rebuild_gives_the_new_rows_and_not_the_cached_ones(small_recipe, slake_row, tmp_path):
    assert main(["build", "all", str(small_recipe)]) == 0
    output = tmp_path / "biovgq"
    before = load_dataset(str(output), "slake", split="train")["answer"]
    rows = [slake_row(1, answer="Heart"), slake_row(2, image=2)]  # as many rows and bytes as before
    (tmp_path / "slake" / "train.json").write_text(json.dumps(rows))
    assert main(["build", "all", str(small_recipe)]) == 0
    after = load_dataset(str(output), "slake", split="train")["answer"]
    assert (list(before), list(after)) == (["Liver", "Liver"], ["Heart", "Liver"])
    assert len(list((output / "data").iterdir())) == 1  # the old files are gone


def test_load_dataset_by_the_folders_name_alone(small_recipe, tmp_path, monkeypatch):
    main(["build", "all", str(small_recipe)])
    monkeypatch.chdir(tmp_path)
    assert load_dataset("biovgq")["validation"].num_rows > 1


def test_pretrain_keeps_the_images_splits(small_recipe, tmp_path):
    main(["build", "all", str(small_recipe)])
    pretrain = load_dataset(str(tmp_path / "biovgq"), "pretrain")
    assert "The liver is at the left, about 8 % of the image." in pretrain["train"]["answer"]
    assert set(pretrain["validation"]["image_id"]) == {"xmlab3/source.jpg"}


def test_a_build_that_was_killed_is_done_again(small_recipe, tmp_path, monkeypatch):
    from biod2c.dataset_builder import build as build_module

    output = tmp_path / "biovgq"
    recipe = read_recipe(small_recipe)
    whole = contents(build(recipe, output).output)
    (tmp_path / "slake" / "mask.txt").write_text("70:Liver")  # a changed input

    def killed(*_):
        raise KeyboardInterrupt

    for step in ("write_data", "dataset_card", "remove_old_data"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build_module, step, killed)
            if step == "remove_old_data":
                (output / "data" / "partial-0").mkdir()
            build(recipe, output)
        assert load_dataset(str(output), split="train").num_rows > 1
    (output / "build.json").write_text("{}")
    assert not build(recipe, output).unchanged
    again = contents(output)
    assert again.keys() == whole.keys()
    assert {n: b for n, b in again.items() if n != "build.json"} == {
        n: b for n, b in whole.items() if n != "build.json"
    }


def test_a_missing_data_file_is_made_again(small_recipe, tmp_path):
    recipe, output = read_recipe(small_recipe), tmp_path / "biovgq"
    build(recipe, output)
    assert build(recipe, output).unchanged
    next(output.rglob("*.parquet")).unlink()
    assert not build(recipe, output).unchanged
    assert load_dataset(str(output), split="train").num_rows > 1


def test_ingest_gives_one_source_with_its_bad_rows_listed(make_slake, slake_row, tmp_path, capsys):
    root = make_slake({"train.json": [slake_row(1), slake_row(2, answer_type="?")]})
    command = ["ingest", "--source", "slake", "--data", str(root), "--output", str(tmp_path / "out")]
    assert main(["build", *command]) == 0
    assert "1 rows skipped" in capsys.readouterr().out
    [line] = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["field"] == "answer_type"
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert (rows.num_rows, rows[0]["queue"], rows[0]["caption"]) == (1, [], None)


def test_default_splits_leave_out_what_cannot_teach(slake_row):
    rows = [
        {"source_split": split, "answer": answer, "group": str(n)}
        for n, (split, answer) in enumerate([("train", "a"), ("train", ""), ("validation", ""), ("test", "a")])
    ]
    official = default_splits(rows, "official")
    assert {split: len(members) for split, members in official.items()} == {"train": 1, "validation": 1, "test": 1}
    shared = default_splits(rows, 0.5)
    assert sum(map(len, shared.values())) == 1


def test_errors_are_one_line(tmp_path, capsys, make_slake, slake_row):
    assert main(["build", "all", str(tmp_path / "none.yaml")]) == 2
    assert (
        main(["build", "ingest", "--source", "slake", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "o")])
        == 2
    )
    bad = make_slake({"train.json": [slake_row(1, answer=None)]})
    assert main(["build", "ingest", "--source", "slake", "--data", str(bad), "--output", str(tmp_path / "o")]) == 2
    assert (tmp_path / "o" / "bad_rows.jsonl").read_text().count("\n") == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    assert main(["build", "ingest", "--source", "slake", "--data", str(bad), "--output", str(tmp_path / "mine")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("biod2c build: ") for line in errors)
    assert (tmp_path / "mine" / "thesis.txt").exists()


GOOD = {"sources": {"slake": {"data": "slake"}}}
BAD_RECIPES = [
    ([], "recipe is"),
    ({"sources": {"pubmed": {"data": "x"}}}, "unknown keys ['pubmed']"),
    ({"sources": {"slake": {}}}, "sources.slake.data"),
    ({"sources": {"slake": {"data": "x", "languages": "en"}}}, "sources.slake.languages"),
    ({**GOOD, "captions": ["vqa_rad"]}, "captions"),
    ({**GOOD, "queue": {"size": 31}}, "queue.size"),
    ({**GOOD, "queue": {"sise": 3}}, "unknown keys ['sise']"),
    ({**GOOD, "default": {"slake": 1.5}}, "default.slake"),
    ({**GOOD, "default": {"vqa_rad": 0.2}}, "default has unknown keys"),
    ({**GOOD, "colour": 1}, "unknown keys ['colour']"),
]


@pytest.mark.parametrize(("content", "message"), BAD_RECIPES)
def test_a_recipe_that_cannot_run_names_its_field(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_small_recipe_has_no_mixture(tmp_path, make_slake, slake_row):
    root = make_slake({"train.json": [slake_row(1)]})
    result = build(Recipe(sources={"slake": SourceOptions(root)}), tmp_path / "out")
    assert result.rows == {"slake": {"train": 1}}
