"""Mixed precision, 4 bits and activation checkpointing: what each part is held in, and that it learns."""

import json

import pytest
import torch
from safetensors.torch import load_file

from biod2c import BioD2CForConditionalGeneration
from biod2c.train_hf import train
from biod2c.training.merge import merge


def logged(run, name="loss"):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.fixture
def base(make_recipe, tmp_path):
    """A whole model in float32, a vision trunk and language model of which others train."""
    return train(make_recipe("base.yaml", output_dir=str(tmp_path / "base"), max_steps=1), [])


def starting_from(base, train_parts=("fusion",), **changes):
    return {"model": str(base), "vocab_size": None, "config": {}, "train": list(train_parts), **changes}


def test_bf16_holds_the_frozen_language_model_in_16_bits_and_what_learns_in_32(make_recipe, base, tmp_path):
    """Losses are float32's to bf16's three digits, and what was saved as float32 is not rounded between stages."""
    fields = starting_from(base, save_strategy="steps", save_steps=1, save_total_limit=1, learning_rate=1e-9)
    exact = train(make_recipe("exact.yaml", **fields), ["--output_dir", str(tmp_path / "exact")])
    stage1 = train(make_recipe("mixed.yaml", **fields), ["--output_dir", str(tmp_path / "mixed"), "--bf16", "true"])
    assert logged(stage1) == pytest.approx(logged(exact), rel=2e-2) and logged(stage1) != logged(exact)
    weights, before = load_file(stage1 / "model.safetensors"), load_file(base / "model.safetensors")
    kinds = {(name.split(".")[0], tensor.dtype) for name, tensor in weights.items() if tensor.is_floating_point()}
    assert kinds == {
        ("vision_model", torch.float32),
        ("fusion", torch.float32),
        ("language_model", torch.bfloat16),
    }
    assert not before["fusion.query_embed"].bfloat16().float().equal(before["fusion.query_embed"])
    assert (weights["fusion.query_embed"] - before["fusion.query_embed"]).abs().max() < 1e-7
    assert BioD2CForConditionalGeneration.from_pretrained(stage1).dtype == torch.bfloat16

    lora = make_recipe("lora.yaml", **starting_from(stage1, ("fusion", "lora")), lora={"r": 2}, bf16=True)
    adapter = load_file(train(lora, ["--output_dir", str(tmp_path / "lora")]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_activation_checkpointing_changes_no_loss(make_recipe, base, tmp_path):
    recipe = make_recipe(**starting_from(base, ("fusion", "lora")), lora={"r": 2, "lora_dropout": 0.1}, max_steps=3)
    runs = [
        train(recipe, ["--output_dir", str(tmp_path / value), "--activation_checkpointing", value])
        for value in ("true", "false")
    ]
    for name in ("loss", "grad_norm"):
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), rel=1e-6)


def test_qlora(make_recipe, base, tmp_path, monkeypatch):
    """bitsandbytes has kernels for a CPU: the language model's layers really are of 4 bits, the adapters learn, and
    merging goes back to the weights of full precision."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'biod2c[quantization]'")
    from biod2c import train_hf

    seen = []

    def look(model):
        layers = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
        seen.append(layers)
        return table(model)

    table = train_hf.parts_table
    monkeypatch.setattr(train_hf, "parts_table", look)
    fields = {"max_steps": 12, "learning_rate": 1e-2, "lora": {"r": 4}, "quantization": {"load_in_4bit": True}}
    output = train(make_recipe(**starting_from(base, ("fusion", "lora"), **fields)), [])
    assert len(seen[0]) == 2 * 7 and all(name.startswith("base_model.model.language_model.") for name in seen[0])
    losses = logged(output, "nll_loss")
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.2  # a random model of 4 bits: little, but steadily
    merge(output, tmp_path / "merged")
    before, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    moved = {name for name in before if name.startswith("language_model") and not before[name].equal(merged[name])}
    assert moved and all("q_proj" in name or "v_proj" in name for name in moved)
