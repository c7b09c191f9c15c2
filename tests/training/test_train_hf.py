"""Whole runs of `train_hf.py` on a tiny model: what is logged, what learns, what is saved, and that a run continues."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from biod2c import BioD2CForConditionalGeneration, BioD2CProcessor
from biod2c.train_hf import main, train
from biod2c.training.merge import merge_adapter


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def module_recipe(tmp_path_factory):
    return tmp_path_factory.mktemp("stage1")


def test_both_losses_are_logged_and_sum_to_the_loss(make_recipe):
    output = train(make_recipe(), [])
    steps = [entry for entry in history(output) if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["nll_loss"] + entry["semantic_loss"], rel=1e-5)
    assert yaml.safe_load((output / "recipe.yaml").read_text())["vocab_size"] == 299


def test_stage_1_has_no_semantic_loss(make_recipe):
    output = train(make_recipe(), ["--config.semantic_loss_weight", "0"])
    assert all("semantic_loss" not in entry for entry in history(output))


def test_accumulation_does_not_change_losses(make_recipe, tmp_path):
    """4 x 2 equals 1 x 8: the same rows, answers of unequal length and rows without a queue among them."""
    common = ["--config.fusion_dropout", "0", "--max_steps", "3", "--lr_scheduler_type", "constant"]
    logged = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = tmp_path / f"{size}x{accumulation}"
        batches = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation)]
        train(make_recipe(), [*common, *batches, "--train", "[fusion, language_model]", "--output_dir", str(run)])
        logged.append([entry for entry in history(run) if "loss" in entry])
    for whole, parts in zip(*logged, strict=True):
        for name in ("loss", "nll_loss", "semantic_loss", "grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_two_stages_then_merge(make_recipe, tmp_path, make_image):
    """Stage 1 trains all from nothing; stage 2 trains LoRA and the fusion module; the merged checkpoint answers
    alike."""
    first = train(make_recipe("stage1.yaml", output_dir=str(tmp_path / "stage1")), [])
    base = load_file(first / "model.safetensors")
    changes = {"model": str(first), "vocab_size": None, "config": {}, "train": ["fusion", "lora"], "lora": {"r": 4}}
    second = train(make_recipe("stage2.yaml", output_dir=str(tmp_path / "stage2"), learning_rate=1e-2, **changes), [])
    adapter = load_file(second / "adapter_model.safetensors")
    assert not [name for name in adapter if "vision_model" in name]  # what is frozen is not saved again
    merge_adapter(second, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name.split(".")[0] for name in moved} == {"fusion", "language_model"}
    assert all("q_proj" in name or "v_proj" in name for name in moved if name.startswith("language_model"))
    model = BioD2CForConditionalGeneration.from_pretrained(tmp_path / "merged")
    inputs = BioD2CProcessor.from_pretrained(tmp_path / "merged")(images=make_image(), text="Is organ 1 here?")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_the_same_command_continues(make_recipe, tmp_path):
    whole = train(make_recipe(output_dir=str(tmp_path / "whole")), ["--max_steps", "6"])
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    stopped = ["--output_dir", str(tmp_path / "parts"), *saving]
    train(make_recipe(), ["--max_steps", "2", "--lr_scheduler_type", "constant", *stopped])
    parts = train(make_recipe(), ["--max_steps", "6", "--lr_scheduler_type", "constant", *stopped])
    again = train(make_recipe(), ["--max_steps", "6", "--lr_scheduler_type", "constant", "--output_dir", str(whole)])
    assert [e["loss"] for e in history(parts) if "loss" in e] == [e["loss"] for e in history(again) if "loss" in e]


def test_frozen_parts_do_not_move(make_recipe, tmp_path):
    first = train(make_recipe("a.yaml", output_dir=str(tmp_path / "a")), [])
    changes = {"model": str(first), "vocab_size": None, "config": {}, "train": ["fusion"]}
    second = train(make_recipe("b.yaml", output_dir=str(tmp_path / "b"), **changes), [])
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("fusion.") for name in moved)  # nor did any BatchNorm statistic


def test_help_and_a_missing_recipe(capsys):
    main(["--help"])
    assert "rows_per_image" in capsys.readouterr().out
    with pytest.raises(ValueError, match="which recipe"):
        main([])


def test_a_source_that_is_not_there(make_recipe):
    with pytest.raises(ValueError, match="no row of the sources"):
        train(make_recipe(), ["--sources", "[pmc_vqa]"])
