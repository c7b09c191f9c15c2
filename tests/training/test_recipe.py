"""A recipe and its overrides: what is accepted, and what each mistake is told."""

import pytest

from biod2c.training.recipe import load_recipe


def test_overrides_are_read_as_yaml_and_reach_into_nested_fields(make_recipe):
    overrides = ["--learning_rate", "2e-5", "--config.gate_init=0.1", "--train", "[fusion]", "--sources", "[slake]"]
    recipe, arguments, values = load_recipe(make_recipe(), overrides)
    assert arguments.learning_rate == 2e-5
    assert recipe.config["gate_init"] == 0.1 and recipe.config["fusion_layers"] == 2
    assert recipe.train == ["fusion"] and recipe.sources == ["slake"]
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
        ({"dataset": None}, "dataset"),
    ],
)
def test_mistakes_are_named(make_recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(make_recipe(**changes), [])


@pytest.mark.parametrize(("words", "message"), [(["fast"], "fast: expected --field"), (["--seed"], "--seed: a value")])
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
