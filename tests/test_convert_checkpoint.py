"""The authors' file and PMC-CLIP's become folders that load, from any of the forms they come in; and what does not fit
is named.

The numbers of the conversion are checked in test_golden.py. Here the language model is tiny and the rest as large as
the authors' code fixes it, filled with a repeated pattern, since drawing 150 million numbers takes longer than all
else.
"""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from biod2c import BioD2CForConditionalGeneration, BioD2CProcessor, BioD2CVisionConfig, BioD2CVisionModel
from biod2c.convert_checkpoint import (
    authors_config,
    authors_name,
    convert_biod2c_checkpoint,
    convert_biod2c_state_dict,
    convert_pmc_clip_checkpoint,
    convert_pmc_clip_state_dict,
    main,
)

GOLDEN = Path(__file__).parent / "golden"
HIDDEN, LAYERS, VOCABULARY, RANK = 64, 2, 300, 8
LORA, PLAIN = "llamacasual.base_model.model.", "llamacasual."
ADAPTED = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qv"]


def authors_layout() -> dict[str, tuple[int, ...]]:
    """Their tiny checkpoint's names and shapes, as their code prints them, with our tokenizer's vocabulary."""
    layout = json.loads((GOLDEN / "state_dict_biod2c_tiny.json").read_text())
    return {key: tuple(VOCABULARY if size == 128 else size for size in shape) if re.search(r"embed_tokens|lm_head", key)
            else tuple(shape) for key, (shape, _) in layout.items()}  # fmt: skip


@pytest.fixture(scope="module")
def layout():
    return authors_layout()


@pytest.fixture(scope="module")
def on_meta(layout):
    """Names and shapes without values: enough for everything that is refused."""
    with torch.device("meta"):
        return {key: torch.empty(shape) for key, shape in layout.items()}


@pytest.fixture(scope="module")
def weights(layout):
    """Values for every living tensor; the dead ones are kept small, since nobody looks at them."""
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for key, shape in layout.items():
        if key.startswith(("decoder_hpm.", "query_embed2.", "fc_hpm.")):
            tensors[key] = torch.zeros(1)
            continue
        size = torch.Size(shape).numel()
        values = pattern.repeat(-(-size // len(pattern)))[:size].view(shape).clone()
        scale = 1.0 if key.endswith("running_var") or "norm" in key else 0.03
        tensors[key] = values.abs() + 0.5 if scale == 1.0 else values * scale
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(7)
        elif key == "beta":
            tensors[key] = torch.tensor(0.3)
    return tensors


# ----------------------------------------------------------------------------------------------------- what is refused


def without(tensors, key):
    return {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize(
    "key",
    [
        "beta",
        "query_embed1.weight",
        "mlp.layer2.bias",
        "fc_l1_gate.weight",
        "decoder.layers.11.multihead_attn.in_proj_weight",
        "decoder.norm.weight",
        "vision_model.12.5.bn3.running_var",
        f"{LORA}model.layers.1.mlp.up_proj.weight",
        f"{LORA}model.layers.0.mlp.gate_proj.weight",
        f"{LORA}lm_head.weight",
    ],
)
def test_a_missing_key_is_named(on_meta, key):
    assert key in on_meta
    with pytest.raises(ValueError, match=f"missing key {re.escape(key)}"):
        convert_biod2c_state_dict(without(on_meta, key))


def test_a_missing_base_weight_is_named(on_meta):
    stem = f"{LORA}model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=f"missing key {re.escape(stem)}.weight"):
        convert_biod2c_state_dict(without(on_meta, f"{stem}.base_layer.weight"))


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("fc_l2.weight", (HIDDEN, 512), (HIDDEN, 1024)),
        ("vision_model.0.weight", (64, 3, 3, 3), (32, 3, 3, 3)),
        ("query_embed1.weight", (16, 1024), (32, 1024)),
        (f"{LORA}model.layers.1.self_attn.v_proj.base_layer.weight", (32, HIDDEN), (HIDDEN, HIDDEN)),
        (f"{LORA}model.layers.1.self_attn.v_proj.lora_A.default.weight", (RANK, 32), (RANK, HIDDEN)),
        (f"{LORA}model.layers.1.self_attn.v_proj.lora_B.default.weight", (HIDDEN, 4), (HIDDEN, RANK)),
    ],
)
def test_a_wrong_shape_is_named(on_meta, key, shape, expected):
    assert key in on_meta
    broken = {**on_meta, key: torch.empty(shape, device="meta")}
    with pytest.raises(ValueError, match=re.escape(f"{key}: shape {shape}, expected {expected}")):
        convert_biod2c_state_dict(broken)


@pytest.mark.parametrize(
    "key", ["decoder3.layers.0.norm1.weight", f"{LORA}model.layers.0.extra.weight", "fc_l3.weight"]
)
def test_an_unknown_key_is_named(on_meta, key):
    with pytest.raises(ValueError, match=f"1 unknown keys, such as {re.escape(key)}"):
        convert_biod2c_state_dict({**on_meta, key: torch.empty(2, device="meta")})


def test_half_a_lora_and_two_loras(on_meta):
    stem = f"{LORA}model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=f"{re.escape(stem)}: expected one lora_A and one lora_B"):
        convert_biod2c_state_dict(without(on_meta, f"{stem}.lora_B.default.weight"))
    second = {f"{stem}.lora_{x}.other.weight": on_meta[f"{stem}.lora_{x}.default.weight"] for x in "AB"}
    with pytest.raises(ValueError, match=r"expected one lora_A and one lora_B, found .*other"):
        convert_biod2c_state_dict({**on_meta, **second})


@pytest.mark.parametrize("tensors", [{}, {"model.embed_tokens.weight": torch.zeros(3, 4)}])
def test_another_models_file(tensors):
    with pytest.raises(ValueError, match="not the authors' checkpoint: no key llamacasual"):
        convert_biod2c_state_dict(tensors)


def test_a_tensor_of_ours_that_theirs_lacks():
    with pytest.raises(
        ValueError, match=r"fusion.new.weight: a tensor of this model that the authors' code does not have"
    ):
        authors_name("fusion.new.weight")


def test_dead_tensors_may_be_there_or_not(on_meta):
    dead = [key for key in on_meta if key.startswith(("decoder_hpm.", "query_embed2.", "fc_hpm."))]
    assert len(dead) > 200
    living = {key: tensor for key, tensor in on_meta.items() if key not in dead}
    buffers = {f"{LORA}model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.empty(32, device="meta") for n in (0, 1)}
    assert set(convert_biod2c_state_dict(living)) == set(convert_biod2c_state_dict({**on_meta, **buffers}))


# --------------------------------------------------------------------------------------- the forms their file comes in


def as_old_peft(tensors):
    """peft before 0.6: the base weight keeps its name."""
    return {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}


def as_saved_adapter(tensors):
    """An adapter's name may be left out."""
    return {key.replace(".default.", "."): tensor for key, tensor in tensors.items()}


def as_trained_without_lora(tensors):
    plain = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    return {key.replace(LORA, PLAIN).replace(".base_layer.", "."): tensor for key, tensor in plain.items()}


@pytest.fixture(scope="module")
def merged(weights):
    return convert_biod2c_state_dict(weights)


def test_lora_is_merged_as_written_down(weights, merged):
    for stem in ADAPTED:
        theirs = f"{LORA}{stem}"
        base, down, up = (
            weights[f"{theirs}.{name}"]
            for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
        )
        wanted = base.double() + 32 / RANK * up.double() @ down.double()
        assert (wanted - base).abs().max() > 1e-3
        torch.testing.assert_close(merged[f"language_model.{stem}.weight"], wanted.float(), atol=1e-6, rtol=1e-6)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(merged[f"language_model.{untouched}"], weights[f"{LORA}{untouched}"])


@pytest.mark.parametrize("form", [as_old_peft, as_saved_adapter, lambda w: as_saved_adapter(as_old_peft(w))])
def test_any_peft_naming_gives_the_same(weights, merged, form):
    assert set(form(weights)) != set(weights)
    converted = convert_biod2c_state_dict(form(weights))
    assert set(converted) == set(merged)
    for stem in ADAPTED:
        key = f"language_model.{stem}.weight"
        assert torch.equal(converted[key], merged[key])


def test_a_checkpoint_without_lora(weights, merged):
    converted = convert_biod2c_state_dict(as_trained_without_lora(weights))
    base = convert_biod2c_state_dict(weights, merge_lora=False)
    assert set(converted) == set(base) == set(merged)
    for key, value in converted.items():
        assert torch.equal(value, base[key]), key


def test_half_precision_is_merged_in_float32(weights):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()
            if key.startswith(LORA) or key not in ("x",)}  # fmt: skip
    converted = convert_biod2c_state_dict(half)
    key = f"language_model.{ADAPTED[0]}.weight"
    base, down, up = (
        half[f"{LORA}{ADAPTED[0]}.{name}"].double()
        for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    assert converted[key].dtype == torch.float16
    assert torch.equal(converted[key], (base + 32 / RANK * up @ down).half())


def test_the_config_says_what_their_code_does(layout):
    config = authors_config(layout)
    assert (config.gate_init, config.semantic_queue_size, config.semantic_features) == (0.1, 10, "projected")
    assert (config.semantic_divergence, config.mask_padding, config.num_scales) == ("t_v", False, 6)
    text = config.text_config
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers) == (VOCABULARY, HIDDEN, LAYERS)
    official = json.loads((GOLDEN / "state_dict_biod2c_official_7b.json").read_text())
    text = authors_config({key: tuple(shape) for key, (shape, _) in official.items()}).text_config
    assert (text.num_attention_heads, text.num_hidden_layers, text.intermediate_size) == (32, 32, 11008)


# --------------------------------------------------------------------------------------------------------- whole files


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, make_tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory, weights):
    file = tmp_path_factory.mktemp("authors") / "model.safetensors"
    save_file({key: t.half() if t.is_floating_point() else t for key, t in weights.items()}, file)
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory, authors_file, tokenizer_folder):
    """Merged, in shards; and beside it the adapter apart, in one file."""
    root = tmp_path_factory.mktemp("converted")
    convert_biod2c_checkpoint(authors_file, root / "merged", tokenizer_folder, max_shard_size="100MB")
    convert_biod2c_checkpoint(authors_file, root / "base", tokenizer_folder, adapter=True)
    return root


@pytest.fixture(scope="module")
def ask(converted, make_image):
    """Logits of a converted folder's model for a question to an image, in float32."""
    processor = BioD2CProcessor.from_pretrained(converted / "merged")
    inputs = processor(images=make_image(), text="Is it left?")

    def run(model):
        with torch.no_grad():
            return model(**inputs).logits

    return run


def test_the_folder(converted):
    names = {file.name for file in (converted / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "modeling_biod2c.py",
        "processing_biod2c.py",
        "tokenizer.json",
    } <= names
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 2
    index = json.loads((converted / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for shard in shards:
        assert (converted / "merged" / shard).stat().st_size < 101e6
        with safe_open(converted / "merged" / shard, framework="pt") as reader:
            held.update(dict.fromkeys(reader.keys(), shard))
    assert held == index
    assert {file.suffix for file in (converted / "base" / "adapter").iterdir()} == {".json", ".safetensors"}
    assert "model.safetensors" in {file.name for file in (converted / "base").iterdir()}


def test_the_processor_asks_as_their_code(converted, make_image):
    processor = BioD2CProcessor.from_pretrained(converted / "merged")
    model_config = json.loads((converted / "merged" / "config.json").read_text())
    assert model_config["image_token_id"] == processor.image_token_id
    inputs = processor(images=make_image(), text="Is it left?")
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "<image>" * 32 + "<s>Question: Is it left? Answer:"
    assert processor.tokenizer.decode(inputs["question_input_ids"][0]).startswith("<s>Question: Is it left? Answer:")
    assert tuple(processor.image_processor.image_mean) == (0.485, 0.456, 0.406)
    generation = json.loads((converted / "merged" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)


def test_the_folder_loads_as_the_state_dict_does(converted, authors_file, ask):
    model = BioD2CForConditionalGeneration.from_pretrained(converted / "merged")
    assert model.dtype == torch.float16
    wanted = convert_biod2c_state_dict(load_file(authors_file))
    state = model.state_dict()
    assert set(state) == set(wanted)
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key
    assert torch.isfinite(ask(model.float())).all()


def test_the_adapter_equals_the_merged_model(converted, ask):
    """Base and adapter by PEFT, and by transformers' own way of opening an adapter's folder."""
    from peft import PeftModel

    merged = BioD2CForConditionalGeneration.from_pretrained(converted / "merged", dtype=torch.float32)
    base = BioD2CForConditionalGeneration.from_pretrained(converted / "base", dtype=torch.float32)
    wanted, bare = ask(merged), ask(base)
    del merged
    adapted = PeftModel.from_pretrained(base, converted / "base" / "adapter")
    assert (wanted - bare).abs().max() > 1e-2
    torch.testing.assert_close(ask(adapted), wanted, atol=5e-3, rtol=0)  # the merged weight was rounded to float16
    settings = json.loads((converted / "base" / "adapter" / "adapter_config.json").read_text())
    assert Path(settings["base_model_name_or_path"]) == (converted / "base").resolve()
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 32)


def test_a_file_is_never_converted_onto_itself(authors_file, tokenizer_folder, monkeypatch):
    size = authors_file.stat().st_size
    monkeypatch.chdir(authors_file.parent)
    for folder in (authors_file.parent, Path(".")):
        with pytest.raises(ValueError, match=r"holds model.safetensors itself, which would be overwritten"):
            convert_biod2c_checkpoint(Path("model.safetensors"), folder, tokenizer_folder)
    assert authors_file.stat().st_size == size
    assert list(authors_file.parent.iterdir()) == [authors_file]


def test_nothing_is_written_for_a_file_that_does_not_fit(tmp_path, tokenizer_folder):
    part = {f"{PLAIN}model.{name}.weight": torch.zeros(30, 8) for name in ("embed_tokens", "layers.0.mlp.gate_proj")}
    save_file(part, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing key"):
        convert_biod2c_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", tokenizer_folder)
    with pytest.raises(OSError):
        convert_biod2c_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", str(tmp_path / "no tokenizer"))
    assert not (tmp_path / "out").exists()


def test_no_adapter_without_lora(tmp_path, tokenizer_folder, weights):
    plain = as_trained_without_lora(weights)
    save_file({key: t.half().contiguous() if t.is_floating_point() else t for key, t in plain.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="has no LoRA tensors"):
        convert_biod2c_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", tokenizer_folder, adapter=True)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ PMC-CLIP


@pytest.fixture(scope="module")
def pmc_clip():
    """`module.visual.*` of their file, of one number each: a view is pickled as the number it repeats."""
    layout = json.loads((GOLDEN / "state_dict_pmcclip_visual.json").read_text())
    tensors = {}
    for number, (key, (shape, _)) in enumerate(layout.items()):
        value = torch.tensor(7) if key.endswith("num_batches_tracked") else torch.tensor(0.5 + number / 1000)
        tensors[f"module.{key}"] = value.expand(shape)
    return tensors


def write_pickle(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("attention_pool", [False, True])
def test_pmc_clip_becomes_a_folder(pmc_clip, tmp_path, capsys, attention_pool):
    other = {"module.text_encoder.weight": torch.zeros(3), "module.logit_scale": torch.zeros(())}
    checkpoint = {"epoch": 3, "name": "PMC-CLIP", "state_dict": {**pmc_clip, **other}, "optimizer": {"lr": 0.1}}
    file = write_pickle(tmp_path / "checkpoint.pt", checkpoint)
    options = ["--attention_pool"] if attention_pool else []
    main(["pmc-clip", str(file), str(tmp_path / "folder"), *options])
    assert re.search(r"checkpoint.pt: sha256 [0-9a-f]{64}\n", capsys.readouterr().out)
    assert {f.name for f in (tmp_path / "folder").iterdir()} >= {"config.json", "model.safetensors"}
    model = BioD2CVisionModel.from_pretrained(tmp_path / "folder")
    assert (model.config.attention_pool, model.config.image_size) == (attention_pool, 224 if attention_pool else 512)
    wanted = convert_pmc_clip_state_dict(pmc_clip)
    assert len(model.state_dict()) == (len(wanted) if attention_pool else len(model.state_dict()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def test_pmc_clip_goes_into_a_model(pmc_clip, make_config, tmp_path):
    from transformers import LlamaForCausalLM

    file = write_pickle(tmp_path / "checkpoint.pt", {"state_dict": pmc_clip})
    convert_pmc_clip_checkpoint(file, tmp_path / "trunk")
    language_model = LlamaForCausalLM(make_config().text_config)
    model = BioD2CForConditionalGeneration.from_components(
        tmp_path / "trunk", language_model, fusion_layers=1, text_mlp_dim=8, image_token_id=299
    )
    assert (model.config.vision_hidden_size, model.config.vision_config.grid_size) == (1024, 32)
    wanted = convert_pmc_clip_state_dict(pmc_clip)
    for key, value in model.vision_model.state_dict().items():
        assert torch.equal(value, wanted[key]), key


@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_pmc_clip_keys(pmc_clip, prefix):
    tensors = {key.replace("module.visual.", prefix): value for key, value in pmc_clip.items()}
    converted = convert_pmc_clip_state_dict({**tensors, "module.bert.visual.weight": torch.zeros(1)})
    with torch.device("meta"):
        whole = BioD2CVisionModel(BioD2CVisionConfig(attention_pool=True, image_size=224)).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in whole.items()}


def test_what_is_no_pmc_clip_is_named(pmc_clip, tmp_path):
    with pytest.raises(ValueError, match=r'no key "visual.layer3.0.conv1.weight" among 1 keys'):
        convert_pmc_clip_state_dict({"visual.conv1.weight": torch.zeros(1)})
    short = {key: value for key, value in pmc_clip.items() if "layer2.1.bn2.weight" not in key}
    wide = {**pmc_clip, "module.visual.bn1.weight": torch.zeros(64)}
    for number, (content, message) in enumerate(
        (
            ({"state_dict": short}, "not PMC-CLIP's image encoder: .*layer2.1.bn2.weight"),
            ({"state_dict": wide}, "not PMC-CLIP's image encoder: .*bn1.weight"),
            ([torch.zeros(1)], "expected a dictionary of tensors, got list"),
        )
    ):
        file = write_pickle(tmp_path / f"{number}.pt", content)
        with pytest.raises(ValueError, match=f"(?s){number}.pt: {message}"):
            convert_pmc_clip_checkpoint(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_a_malicious_pickle_is_refused(pmc_clip, tmp_path, write):
    """Its code does not run, whether it is one of torch's archives or a plain pickle."""
    trap, file = tmp_path / "trap", tmp_path / "evil.pt"
    write({"state_dict": {"x": RunsCode(str(trap))}}, file)
    with pytest.raises(ValueError, match=r"evil.pt: not a checkpoint of plain tensors"):
        convert_pmc_clip_checkpoint(file, tmp_path / "out")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(RunsCode(str(trap))))  # the trap itself works
    assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"liver", b"\x80\x04", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.pt: not a checkpoint of plain tensors"):
        convert_pmc_clip_checkpoint(tmp_path / "broken.pt", tmp_path / "out")
