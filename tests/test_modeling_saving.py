"""Weights survive what is done to them: saving, sharding, tying, assembling from parts, LoRA; a misfit is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
)

from biod2c import BioD2CForConditionalGeneration, BioD2CProcessor, BioD2CVisionModel

GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic")
DINOV2 = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
CODE = {"configuration_biod2c.py", "modeling_biod2c.py", "processing_biod2c.py", "image_processing_biod2c.py"}


@pytest.fixture(scope="module")
def inputs(processor, make_image):
    return dict(processor(images=[make_image(0), make_image(1)], text=["Where?", "Where is the liver?"]))


@pytest.fixture(scope="module")
def parts(make_config):
    """Fields of `from_components` for tiny parts."""
    names = (
        "image_token_id",
        "num_visual_tokens",
        "num_question_tokens",
        "text_mlp_dim",
        "fusion_layers",
        "fusion_heads",
    )
    config = make_config()
    return {**{name: getattr(config, name) for name in names}, "num_scales": 2}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def same_weights(one: torch.nn.Module, other: torch.nn.Module | dict) -> None:
    state = one.state_dict()
    wanted = other if isinstance(other, dict) else other.state_dict()
    assert set(state) == set(wanted)
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key


# ------------------------------------------------------------------------------------------------------- save and load

KINDS = {
    "the paper's": {},
    "w/o fm": {"use_fusion": False},
    "sine": {"image_position_embedding": "sine"},
    "tied language model": {"text_config": AutoConfig.for_model("gpt2", **GPT2)},
    "transformers backbone": {"vision_config": RESNET, "num_scales": 2},
}


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_save_load_save(make_model, processor, inputs, tmp_path, fields, dtype, max_shard_size):
    model, wanted = make_model(**fields).to(dtype), None
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder, max_shard_size=max_shard_size)
        processor.save_pretrained(tmp_path / folder)
        model = BioD2CForConditionalGeneration.from_pretrained(tmp_path / folder)
        processor = BioD2CProcessor.from_pretrained(tmp_path / folder)
        assert model.dtype == dtype
        wanted = logits(model, inputs) if wanted is None else wanted  # `to` also rounds RoPE's buffer, loading does not
        assert torch.equal(logits(model, inputs), wanted)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert set(one) > CODE
    suffixes = {Path(name).suffix for name in one}
    assert suffixes <= {".json", ".safetensors", ".py", ".jinja"}
    assert (len([name for name in one if name.endswith(".safetensors")]) > 2) is (max_shard_size == "60KB")


def test_what_the_config_file_says(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["architectures"] == ["BioD2CForConditionalGeneration"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert json.loads((tiny_checkpoint / "processor_config.json").read_text())["auto_map"]["AutoProcessor"]


def test_tied_embeddings_stay_tied(make_model, tmp_path):
    make_model(**KINDS["tied language model"]).save_pretrained(tmp_path)
    model = BioD2CForConditionalGeneration.from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_map(tiny_checkpoint, inputs, device_map):
    wanted = logits(BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint), inputs)
    model = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, device_map=device_map)
    assert torch.equal(logits(model.to("cpu") if device_map == "auto" else model, inputs), wanted)


def test_parts_on_disk(tiny_checkpoint, inputs, tmp_path):
    """Offloaded layers: accelerate's hooks bring each module's weights when it runs, so no module may reach into
    another.
    """
    wanted = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    device_map = {"vision_model": "disk", "fusion": "disk", "language_model.model.embed_tokens": "cpu",
                  "language_model.model.layers": "disk", "language_model.model.norm": "cpu",
                  "language_model.model.rotary_emb": "cpu", "language_model.lm_head": "cpu"}  # fmt: skip
    model = BioD2CForConditionalGeneration.from_pretrained(
        tiny_checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    assert torch.equal(logits(model, inputs), logits(wanted, inputs))
    settings = {"do_sample": False, "max_new_tokens": 3}
    assert torch.equal(model.generate(**inputs, **settings), wanted.generate(**inputs, **settings))


def test_more_words(tiny_checkpoint, inputs, tmp_path):
    """A language model that was given new tokens afterwards."""
    model = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    before = logits(model, inputs)
    model.resize_token_embeddings(310)
    assert model.config.text_config.vocab_size == 310
    wanted = logits(model, inputs)
    assert torch.equal(wanted[..., :300], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BioD2CForConditionalGeneration.from_pretrained(tmp_path), inputs), wanted)


def test_eager_attention(tiny_checkpoint, inputs):
    """The language model's own attention weights, for whoever wants to look at them."""
    wanted = logits(BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint), inputs)
    model = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    seen = inputs["attention_mask"].bool()  # a row of padding attends to nothing, or to everything: not the same here
    torch.testing.assert_close(output.logits[seen], wanted[seen], atol=1e-5, rtol=1e-5)
    assert output.attentions[0].shape == (2, 4, *[inputs["input_ids"].shape[1]] * 2)
    assert len(output.hidden_states) == 3


def test_loaded_in_another_precision(tiny_checkpoint, inputs):
    model = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, inputs).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- weights that do not fit the config

MISFITS = {
    "a layer more": ({"fusion_layers": 3}, "18 missing .*fusion.decoder.layers.2"),
    "a layer less": ({"fusion_layers": 1}, "18 not in the configuration .*fusion.decoder.layers.1"),
    "another ffn": ({"fusion_ffn_dim": 16}, r"6 of another shape .*linear1.bias: \(32,\), not \(16,\)"),
    "other queries": (
        {"num_visual_tokens": 4, "num_question_tokens": 4},
        r"1 of another shape .*query_embed: \(8, 128\), not \(4, 128\)",
    ),
    "another vocabulary": ({"text_config": {"vocab_size": 200}}, r"2 of another shape .*\(300, 32\), not \(200, 32\)"),
    "a deeper language model": ({"text_config": {"num_hidden_layers": 3}}, "missing .*language_model.model.layers.2"),
    "a deeper trunk": ({"vision_config": {"layers": [1, 2, 1, 1]}}, "missing .*vision_model.layer2.1"),
    "the pool too": (
        {"vision_config": {"attention_pool": True, "attention_pool_heads": 4}},
        "missing .*vision_model.attnpool",
    ),
}


def with_config(source: Path, target: Path, changes: dict) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_config_and_weights_disagree(tiny_checkpoint, tmp_path, changes, message):
    folder = with_config(tiny_checkpoint, tmp_path / "other", changes)
    with pytest.raises(ValueError, match=f"other: config.json and the weights disagree: .*{message}"):
        BioD2CForConditionalGeneration.from_pretrained(folder)


def test_weights_that_are_cut_off(tiny_checkpoint, tmp_path):
    folder = with_config(tiny_checkpoint, tmp_path / "cut", {})
    weights = load_file(folder / "model.safetensors")
    del weights["fusion.gate.beta"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cut: .* 1 missing .such as fusion.gate.beta"):
        BioD2CForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=folder)


def test_misshapen_weights_on_request(tiny_checkpoint, tmp_path):
    """transformers' own switch still works, for whoever wants another head."""
    folder = with_config(tiny_checkpoint, tmp_path / "other", {"fusion_ffn_dim": 16})
    model, info = BioD2CForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.fusion.decoder.layers[0].linear1.weight.shape == (16, 128)
    assert len(info["mismatched_keys"]) == 6


def test_the_ablation_starts_from_a_full_model_but_not_the_reverse(tiny_checkpoint, make_model, tmp_path):
    full = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    ablation = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, use_fusion=False)
    same_weights(ablation, {k: v for k, v in full.state_dict().items() if k in ablation.state_dict()})
    with pytest.raises(ValueError, match=r"not in the configuration .such as fusion.decoder.layers.1"):
        BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, use_fusion=False, fusion_layers=1)
    ablation.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing .such as fusion.gate.beta"):
        BioD2CForConditionalGeneration.from_pretrained(tmp_path, use_fusion=True)


# ----------------------------------------------------------------------------------------------------- from components


def marked(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that no initialisation would give."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("as_folder", [None, str, Path], ids=["models", "str", "Path"])
@pytest.mark.parametrize("kind", ["own trunk", "resnet backbone", "resnet classifier", "dinov2"])
def test_from_components_keeps_the_weights(make_config, parts, tmp_path, kind, as_folder):
    own = {
        "own trunk": lambda: BioD2CVisionModel(make_config().vision_config),
        "resnet backbone": lambda: ResNetBackbone(RESNET),
        "resnet classifier": lambda: ResNetForImageClassification(RESNET),
        "dinov2": lambda: Dinov2Model(DINOV2),
    }
    vision, language_model = marked(own[kind]()), marked(LlamaForCausalLM(make_config().text_config))
    seen, spoken = snapshot(vision), snapshot(language_model)
    if as_folder is None and kind in ("resnet classifier", "dinov2"):
        with pytest.raises(ValueError, match=f"{type(vision).__name__} gives None; must be a .* backbone"):
            BioD2CForConditionalGeneration.from_components(vision, language_model, **parts)
        return
    if as_folder is not None:
        vision.save_pretrained(tmp_path / "vision")
        language_model.save_pretrained(tmp_path / "language")
        vision, language_model = as_folder(tmp_path / "vision"), as_folder(tmp_path / "language")
    model = BioD2CForConditionalGeneration.from_components(vision=vision, language_model=language_model, **parts)
    trunk = {key.removeprefix("resnet."): value for key, value in seen.items() if not key.startswith("classifier.")}
    same_weights(model.vision_model, trunk)
    same_weights(model.language_model, spoken)
    assert torch.isfinite(model.fusion.query_embed).all()
    model.save_pretrained(tmp_path / "joined")
    same_weights(BioD2CForConditionalGeneration.from_pretrained(tmp_path / "joined"), model)


@pytest.mark.parametrize("change", ["resized", "replaced head", "tied"])
def test_from_components_keeps_parts_that_were_changed_by_hand(make_config, parts, change):
    if change == "tied":
        language_model = GPT2LMHeadModel(GPT2Config(**GPT2))
    else:
        language_model = LlamaForCausalLM(make_config().text_config)
    if change == "resized":
        language_model.resize_token_embeddings(310)
    if change == "replaced head":
        language_model.lm_head = torch.nn.Linear(32, 300, bias=False)
    marked(language_model)
    spoken = snapshot(language_model)
    model = BioD2CForConditionalGeneration.from_components(
        marked(BioD2CVisionModel(make_config().vision_config)), language_model, **parts
    )
    same_weights(model.language_model, spoken)
    assert model.config.text_config.vocab_size == len(spoken["lm_head.weight"])


def test_from_components_takes_the_generation_settings(make_config, parts):
    language_model = LlamaForCausalLM(make_config().text_config)
    language_model.generation_config.update(eos_token_id=[2, 7], pad_token_id=0, max_new_tokens=11)
    model = BioD2CForConditionalGeneration.from_components(
        BioD2CVisionModel(make_config().vision_config), language_model, **parts
    )
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens) == ([2, 7], 0, 11)


def test_from_components_keeps_the_attention_of_its_parts(make_config, parts):
    """Without one, transformers computes attention the slow way, and says nothing."""
    language_model = LlamaForCausalLM(make_config().text_config)
    before = language_model.config._attn_implementation
    model = BioD2CForConditionalGeneration.from_components(
        BioD2CVisionModel(make_config().vision_config), language_model, **parts
    )
    assert model.language_model.config._attn_implementation == before == "sdpa"


@pytest.mark.parametrize("part", ["vision", "language"])
def test_from_components_refuses_a_folder_with_missing_weights(make_config, parts, tmp_path, part):
    BioD2CVisionModel(make_config().vision_config).save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(make_config().text_config).save_pretrained(tmp_path / "language")
    file, missing = tmp_path / part / "model.safetensors", {"vision": "layer3", "language": "model.layers.1."}[part]
    kept = {key: value for key, value in load_file(file).items() if not key.startswith(missing)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"{part}: config.json and the weights disagree: .* missing .such as {missing}"
    ):
        BioD2CForConditionalGeneration.from_components(tmp_path / "vision", tmp_path / "language", **parts)


def test_from_components_in_mixed_precision(make_config, parts, inputs, tmp_path):
    """A language model in bfloat16, as it is published, beside an encoder in float32."""
    language_model = LlamaForCausalLM(make_config().text_config).to(torch.bfloat16)
    model = BioD2CForConditionalGeneration.from_components(
        BioD2CVisionModel(make_config().vision_config), language_model, **parts
    )
    assert model.fusion.query_embed.dtype == torch.float32
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert torch.isfinite(logits(model, inputs)).all()


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_trains_and_comes_back(tiny_checkpoint, inputs, tmp_path):
    """The paper's stage 2: adapters on q and v, the fusion trained whole; a step, save, load, merge."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    before, wanted = snapshot(base), logits(base, inputs)
    lora = LoraConfig(r=4, target_modules=r"language_model\..*(q_proj|v_proj)", modules_to_save=["fusion"])
    model = get_peft_model(base, lora)
    assert torch.equal(logits(model, inputs), wanted)
    model.train()
    assert not base.vision_model.training
    assert base.fusion.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step only moves B, which starts at zero
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = logits(model, inputs)
    assert (trained - wanted).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}

    again = PeftModel.from_pretrained(BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint), tmp_path)
    assert torch.equal(logits(again, inputs), trained)
    settings = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))
    directly = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    directly.load_adapter(tmp_path)
    assert torch.equal(logits(directly, inputs), trained)
    by_name = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True
    )  # the base's is in its config
    assert torch.equal(logits(by_name, inputs), trained)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain = BioD2CForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain, inputs), trained, atol=1e-5, rtol=1e-5)
    untouched = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint).state_dict()
    assert all(torch.equal(untouched[key], value) for key, value in before.items())


def test_lora_over_bfloat16_trains_its_modules_in_float32(tiny_checkpoint, inputs):
    from peft import LoraConfig, get_peft_model

    base = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=r"language_model\..*(q_proj|v_proj)", modules_to_save=["fusion"])
    model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("fusion.modules_to_save" in name for name in trained)
    assert any("lora_A" in name for name in trained)


def test_language_model_alone_is_a_causal_language_model(make_config, tmp_path):
    """A part can be taken out again: its folder loads by itself."""
    marked(LlamaForCausalLM(make_config().text_config)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"
