"""Whole runs of `train_hf.py` on a tiny model: what is logged, what learns, what is saved, and that a run continues."""

import io
import json

import pytest
import torch
import yaml
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from biod2c import BioD2CForConditionalGeneration, BioD2CProcessor, BioD2CVisionConfig, BioD2CVisionModel
from biod2c.dataset_builder.schema import FEATURES
from biod2c.train_hf import main, train
from biod2c.training.data import AnswerCollator
from biod2c.training.merge import merge


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


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
    merge(second, tmp_path / "merged")
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
    with pytest.raises(ValueError, match="no row of pmc_vqa; there are slake, vqa_rad"):
        train(make_recipe(), ["--sources", "[pmc_vqa]"])


def test_too_many_unreadable_images_end_the_run(make_recipe, make_rows, tmp_path):
    """One image of six is damaged: 4 rows of 24."""
    rows = make_rows(6, 4)
    for row in rows[:4]:
        row["image"] = {"bytes": b"not an image", "path": None}
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "damaged" / "train.parquet")
    recipe = make_recipe(dataset=str(tmp_path / "damaged"), max_steps=3)
    with pytest.raises(ValueError, match=r"of 24 rows could not be read, more than the limit of 1\.0%"):
        train(recipe, [])
    losses = []
    for workers in ("0", "2"):
        tolerant = ["--bad_sample_limit", "0.2", "--max_steps", "6", "--dataloader_num_workers", workers]
        output = train(recipe, [*tolerant, "--output_dir", str(tmp_path / workers)])
        recorded = [json.loads(line)["id"] for line in (output / "bad_samples.jsonl").read_text().splitlines()]
        assert sorted(recorded) == ["0-0", "0-1", "0-2", "0-3"]  # once, in two epochs
        losses.append([entry["loss"] for entry in history(output) if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_held_out_losses_are_means_over_tokens_and_rows(make_recipe, dataset_folder):
    """The batches hold 3, 3 and 2 rows; a mean of their means would be another number."""
    evaluating = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 2, "eval_questions": 5}
    output = train(make_recipe(per_device_eval_batch_size=3, **evaluating), [])
    (logged,) = [entry for entry in history(output) if "eval_loss" in entry]
    model = BioD2CForConditionalGeneration.from_pretrained(output).eval()
    processor = BioD2CProcessor.from_pretrained(output)
    rows = Dataset.from_parquet(str(dataset_folder / "validation.parquet")).cast_column("image", Image(decode=False))
    with torch.no_grad():
        whole = model(**AnswerCollator(processor, queue_size=30)(list(rows)))
    assert logged["eval_nll_loss"] == pytest.approx(whole.nll_loss.item(), rel=1e-5)
    assert logged["eval_semantic_loss"] == pytest.approx(whole.semantic_loss.item(), rel=1e-5)
    assert logged["eval_loss"] == pytest.approx(whole.loss.item(), rel=1e-5)
    predictions = [ask(model, processor, row) for row in rows.select(range(5))]
    right = [prediction == row["answer"].lower() for prediction, row in zip(predictions, rows, strict=False)]
    assert logged["eval_accuracy"] == pytest.approx(sum(right) / 5)
    with PILImage.open(output / "losses.png") as picture:
        assert picture.size[0] > 500


def ask(model, processor, row):
    inputs = processor(images=PILImage.open(io.BytesIO(row["image"]["bytes"])), text=row["question"])
    new = model.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip().lower()


def test_early_stopping_and_the_best_checkpoint(make_recipe):
    """A learning rate of 0 betters nothing: the run ends after the second evaluation."""
    evaluating = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    best = {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_nll_loss"}
    recipe = make_recipe(max_steps=6, learning_rate=0.0, early_stopping_patience=1, **evaluating, **best)
    output = train(recipe, ["--greater_is_better", "false", "--train", "[fusion]"])
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["best_model_checkpoint"] == str(output / "checkpoint-1")


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_other_language_models_by_recipe_alone(make_recipe, tmp_path, make_tokenizer, model_type):
    """Two folders, as downloaded: a vision encoder and a causal language model with its tokenizer."""
    own = {"num_key_value_heads": 2, "head_dim": 8}
    text_config = AutoConfig.for_model(model_type, vocab_size=299, **SMALL, **own)
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    vision = BioD2CVisionModel(BioD2CVisionConfig(layers=(1, 1, 1), width=8, image_size=64))
    vision.save_pretrained(tmp_path / "vision")
    changes = {"vocab_size": None, "vision": str(tmp_path / "vision"), "language_model": str(tmp_path / "lm")}
    joined = {"num_visual_tokens": 8, "num_question_tokens": 8, "num_scales": 3, "fusion_layers": 1}
    first = train(make_recipe(**changes, config=joined, train=["fusion"]), ["--output_dir", str(tmp_path / "first")])
    saved = BioD2CProcessor.from_pretrained(first)
    assert saved.image_processor.size["height"] == 64 and saved.num_visual_tokens == 8
    start = {"model": str(first), "vocab_size": None, "config": {}}
    second = train(make_recipe(**start, train=["fusion", "lora"], lora={"r": 2}), [])
    for output in (first, second):
        losses = [entry["loss"] for entry in history(output) if "loss" in entry]
        assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
