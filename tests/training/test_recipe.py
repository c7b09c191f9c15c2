"""A recipe and its overrides: what is accepted, and what each mistake is told."""

from pathlib import Path

import pytest

from biod2c.train_hf import find_recipe
from biod2c.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_overrides_are_read_as_yaml_and_reach_into_nested_fields(make_recipe):
    overrides = ["--learning_rate", "2e-5", "--config.gate_init=0.1", "--train", "[fusion]", "--sources", "[slake]"]
    recipe, arguments, values = load_recipe(make_recipe(), overrides)
    assert arguments.learning_rate == 2e-5
    assert recipe.config["gate_init"] == 0.1 and recipe.config["fusion_layers"] == 2
    assert recipe.train == ["fusion"] and recipe.sources == {"slake": 1}
    assert values["config"]["gate_init"] == 0.1  # what is saved beside the run is what ran


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown field learning_rat; the nearest is learning_rate"),
        ({"model": "a", "vocab_size": 299}, "exactly one of model, vision"),
        ({"vocab_size": None}, "given: none"),
        ({"train": ["lorra"]}, "train: lorra: choose from vision, fusion"),
        ({"train": []}, "train: nothing"),
        ({"train": ["lora", "language_model"]}, "name either lora or language_model"),
        ({"train": ["fusion", "lora"]}, "lora needs `model`, a saved checkpoint"),
        ({"quantization": {"load_in_4bit": True}}, "quantization: weights of 4 or 8 bits cannot learn"),
        ({"dataset": None}, "dataset"),
        ({"dataset": [{"name": "default"}]}, "a mapping needs a path"),
        ({"dataset": [{"path": "a", "weight": 0}]}, "dataset a: weight 0, must be a number above 0"),
        ({"dataset": [{"path": "a", "split": "train"}]}, "dataset a: split does not belong there"),
        ({"dataset": ["a", "b"]}, "expected a folder, a name or a list of mappings"),
        ({"rows_per_image": 2, "train_sampling_strategy": "sequential"}, "rows_per_image has its own"),
    ],
)
def test_mistakes_are_named(make_recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(make_recipe(**changes), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fast"], "fast: expected --field"),
        (["--seed"], "--seed: a value"),
        (["--lora", "{r: "], r"^--lora \{r: : the value is not YAML \(.*\)$"),
        (["--dataset.path", "a"], "--dataset.path: dataset is '.*', which has no fields"),
    ],
)
def test_broken_overrides(make_recipe, words, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(make_recipe(), words)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_a_file_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml: "):
        load_recipe(path, [])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml", [])


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*stage*.yaml")) + sorted(RECIPES.glob("ablations/*.yaml")), ids=str
)
def test_every_recipe_in_the_repository_is_understood(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe, arguments, _ = load_recipe(path, ["--bf16", "false"])  # a GPU's business
    assert arguments.learning_rate > 0 and arguments.output_dir.startswith("out/")
    if "demo" not in path.parts:  # the paper's hyperparameters (section 4.1)
        assert arguments.learning_rate == (5e-5 if path.stem == "stage1" else 2e-5)
        assert arguments.num_train_epochs == (1 if path.stem == "stage1" else 5)
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32
        assert recipe.train == (["fusion"] if path.stem == "stage1" else ["fusion", "lora"])


def test_recipes_of_the_package_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("ablations/wo_fusion").is_file()
    assert find_recipe("mine.yaml") == Path("mine.yaml")
    (tmp_path / "stage1.yaml").write_text("mine")
    assert find_recipe("stage1.yaml") == Path("stage1.yaml")  # a file that is there comes first
