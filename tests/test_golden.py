"""Parity with the authors' own code, on the numbers it printed for synthetic weights (tests/golden/README.md).

The weights go in under the authors' names, through `convert_checkpoint`; the outputs are those of the public classes.
BIOD2C_GOLDEN names another folder of the same recipe (another seed).
"""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from biod2c.configuration_biod2c import BioD2CVisionConfig
from biod2c.convert_checkpoint import (
    LANGUAGE_MODEL_PREFIXES,
    authors_config,
    authors_name,
    convert_biod2c_state_dict,
    convert_pmc_clip_state_dict,
)
from biod2c.modeling_biod2c import (
    BioD2CForConditionalGeneration,
    BioD2CVisionModel,
    MultiScaleFeatureEnhancement,
    semantic_distribution,
    semantic_loss,
)

GOLDEN = Path(os.environ.get("BIOD2C_GOLDEN") or Path(__file__).parent / "golden")
SEED = int(re.search(r"seed(\d+)", next(GOLDEN.glob("biod2c_seed*.safetensors")).name)[1])
SCALARS = json.loads((GOLDEN / f"scalars_seed{SEED}.json").read_text())
WANTED = load_file(GOLDEN / f"biod2c_seed{SEED}.safetensors")
PURE = load_file(GOLDEN / f"pure_seed{SEED}.safetensors")
ACTIVATIONS, LOSSES, DISTRIBUTIONS, GRADIENTS = 2e-5, 1e-5, 1e-6, 1e-3


def _load_recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


R = _load_recipe()


def close(actual: torch.Tensor, wanted: torch.Tensor, atol: float = ACTIVATIONS) -> None:
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def upstream() -> dict[str, torch.Tensor]:
    """The authors' state dict; the values of dead tensors never matter, so theirs are left out of the arithmetic."""
    layout = json.loads((GOLDEN / "state_dict_biod2c_tiny.json").read_text())
    dead = ("decoder_hpm.", "query_embed2.", "fc_hpm.")
    return {
        key: torch.zeros(1).expand(shape) if key.startswith(dead) else R.value_for(key, tuple(shape), SEED)
        for key, (shape, _) in layout.items()
    }


def build(upstream: dict[str, torch.Tensor], merge_lora: bool = True) -> BioD2CForConditionalGeneration:
    config = authors_config({key: tuple(value.shape) for key, value in upstream.items()})
    tiny = {key: value for key, value in R.TINY_LLAMA.items() if key != "rope_theta"}
    config.text_config = LlamaConfig(**tiny, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    state_dict = convert_biod2c_state_dict(upstream, merge_lora)
    return BioD2CForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict).eval()


@pytest.fixture(scope="module")
def model(upstream) -> BioD2CForConditionalGeneration:
    return build(upstream)


@pytest.fixture(scope="module")
def inputs(model) -> dict[str, torch.Tensor]:
    x = R.biod2c_inputs(SEED)
    placeholders = torch.full((2, 32), model.config.image_token_id)
    return {
        "input_ids": torch.cat([placeholders, x["input_ids"]], 1),
        "pixel_values": x["images"],
        "question_input_ids": x["pre_text"],
        "queue_input_ids": x["queue_text"],
        "labels": x["labels"],
    }


@pytest.fixture(scope="module")
def run(model, inputs):
    """One forward and backward pass, with what each box of Fig. 2 gave."""
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name):
        def hook(module, args, output):
            seen.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

        return hook

    fusion = model.fusion
    modules = {
        "mfe": fusion.mfe,
        "text": fusion.text_encoder,
        "proj": fusion.proj,
        "proj_gate": fusion.proj_gate,
        "decoder": fusion.decoder,
        "layer0": fusion.decoder.layers[0],
        "layer11": fusion.decoder.layers[11],
        "vision": model.vision_model,
    }
    hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    output = model(**inputs)
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    seen["vision"] = [seen["vision"][0].image_grid]
    return output, seen


def test_inputs_follow_the_recipe(inputs):
    assert torch.equal(inputs["pixel_values"][:, :, ::32, ::32], WANTED["in.images.sub"])
    for ours, theirs in (("question_input_ids", "pre_text"), ("queue_input_ids", "queue_text"), ("labels", "labels")):
        assert torch.equal(inputs[ours], WANTED[f"in.{theirs}"])
    assert torch.equal(inputs["input_ids"][:, 32:], WANTED["in.input_ids"])


def test_vision_trunk(run):
    grid = run[1]["vision"][0]
    close(grid[:, ::16, ::4, ::4], WANTED["trunk.sub"])
    close(grid.mean((2, 3)), WANTED["trunk.channel_mean"])
    close(grid.std((2, 3), correction=0), WANTED["trunk.channel_std"])


def test_multi_scale_features(run):
    cells = run[1]["mfe"][0]
    close(cells[:, ::13, ::16], WANTED["hpm.sub"])
    close(cells[:, :21, ::4], WANTED["hpm.first21"])
    close(cells.mean(1), WANTED["hpm.channel_mean"])


def test_text_encoding_and_decoder(run):
    seen = run[1]
    close(seen["text"][0], WANTED["text_mlp"])
    for number, name in enumerate(("dec_v", "dec_vt")):  # the learned queries' pass comes first
        close(seen["decoder"][number], WANTED[name])
        for layer in ("layer0", "layer11"):
            # the tolerance is for values near 1; the residual stream grows to 30, where the stored float32 numbers are
            # themselves 1.7e-5 from a float64 run
            wanted = WANTED[f"{name}.{layer}"]
            close(seen[layer][number][:, ::4], wanted, ACTIVATIONS * max(1.0, wanted.std().item()))


def test_projections_and_gate(run):
    output, seen = run
    close(seen["proj"][0], WANTED["proj_v"])
    close(seen["proj_gate"][0], WANTED["proj_g_vt"])
    close(output.image_hidden_states, WANTED["fused"])


def test_language_model(model, run, inputs):
    close(model.get_input_embeddings()(inputs["input_ids"][:, 32:]), WANTED["text_embeds"])
    close(run[0].logits, WANTED["logits"])


def test_logits_without_lora(upstream, inputs):
    model = build(upstream, merge_lora=False)
    with torch.no_grad():
        output = model(**inputs)
    close(output.logits, WANTED["logits_nolora"])
    assert output.nll_loss.item() == pytest.approx(SCALARS["scalars"]["loss_lm_nolora"], abs=LOSSES)


def test_losses(run):
    output, scalars = run[0], SCALARS["scalars"]
    assert output.nll_loss.item() == pytest.approx(scalars["loss_lm"], abs=LOSSES)
    assert output.semantic_loss.item() == pytest.approx(scalars["loss_sem"], abs=LOSSES)
    assert output.loss.item() == pytest.approx(scalars["loss_total"], abs=LOSSES)


def test_semantic_distributions(model, run, inputs):
    embed = model.get_input_embeddings()
    queue = embed(inputs["queue_input_ids"])
    for name, features in (("text", embed(inputs["question_input_ids"])), ("image", run[1]["proj"][0])):
        log_p = semantic_distribution(features, queue, temperature=0.1)
        close(log_p.exp(), WANTED[f"sem.p_{name}"], DISTRIBUTIONS)


def lora_gradients(upstream, stem: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Chain rule of W + (32 / 8) B A: the adapters' gradients from that of the merged weight."""
    down, up = (f"{stem}.lora_{x}.default.weight" for x in "AB")
    return {down: 4 * upstream[up].T @ gradient, up: 4 * gradient @ upstream[down].T}


def test_gradient_norms(upstream, model, run):
    gradients = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("language_model."):
            gradients[authors_name(name)] = parameter.grad
        elif name.endswith(("q_proj.weight", "v_proj.weight")):
            stem = authors_name(name, LANGUAGE_MODEL_PREFIXES[0]).removesuffix(".weight")
            gradients.update(lora_gradients(upstream, stem, parameter.grad))
    wanted = SCALARS["grad_norms"]
    assert set(gradients) == set(wanted)
    for key, norm in wanted.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=GRADIENTS, abs=1e-7), key
    assert gradients["beta"].item() == pytest.approx(SCALARS["scalars"]["grad_beta"], rel=GRADIENTS)


def test_gradients(model, run):
    fusion = model.fusion
    pairs = {
        "grad.mlp.layer1.weight.sub": fusion.text_encoder.linear1.weight.grad[::32, ::4],
        "grad.query_embed1.weight.sub": fusion.query_embed.grad[:, ::16],
        "grad.fc_l2.weight.sub": fusion.proj.linear2.weight.grad[:, ::16],
        "grad.fc_l2_gate.weight.sub": fusion.proj_gate.linear2.weight.grad[:, ::16],
        "grad.decoder0.cross_in_proj.sub": fusion.decoder.layers[0].cross_attn.in_proj_weight.grad[::64, ::16],
    }
    assert {key for key in WANTED if key.startswith("grad.")} == set(pairs)
    for key, actual in pairs.items():
        scale = WANTED[key].abs().max().item()
        close(actual, WANTED[key], atol=GRADIENTS * scale)


@pytest.mark.parametrize("length", ["short", "long"])
def test_generation(model, length):
    x = R.generate_inputs(SEED)
    prompt = x[length]
    question = torch.nn.functional.pad(prompt[:, :32], (0, max(0, 32 - prompt.shape[1])))
    placeholders = torch.full((1, 32), model.config.image_token_id)
    question_inputs = {"pixel_values": x["images"], "question_input_ids": question}
    close(model.get_image_features(**question_inputs), WANTED[f"gen.fused_{length}"])
    ids = torch.cat([placeholders, prompt], 1)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **question_inputs, do_sample=False, min_new_tokens=8, max_new_tokens=8
    )
    assert output[0, ids.shape[1] :].tolist() == WANTED[f"gen.ids_{length}"].flatten().tolist()


@pytest.mark.parametrize("name", ["g32", "g8"])  # in g10 the authors drop the cells that remain; here none is lost
def test_pooling_alone(name):
    grid, scales = R.grid_inputs(SEED)[name], R.GRIDS[name][3]
    rows = MultiScaleFeatureEnhancement(scales)(grid.permute(0, 3, 1, 2))
    assert rows.shape[1] == SCALARS["scalars"]["pool_rows"][name]
    close(rows[..., ::16] if name == "g32" else rows, PURE[f"pool.{name}"])
    if name == "g32":  # a sum of 1024 channels, in float64
        close(rows.double().sum(-1), PURE["pool.g32.sum_channels"].double(), atol=1e-3)


def test_more_scales_than_cells_is_an_error():
    with pytest.raises(ValueError, match="num_scales=6 needs a grid of at least 32 cells a side, got 8"):
        MultiScaleFeatureEnhancement(6)(R.grid_inputs(SEED)["g8"].permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", [*R.SEMANTIC, "small"])
def test_semantic_loss_alone(name):
    stored = (*(PURE[f"sem.small.{x}"] for x in ("text", "image", "queue")), 0.1)
    text, image, queue, temperature = stored if name == "small" else R.semantic_inputs(SEED)[name]
    image.requires_grad_()
    loss = semantic_loss(image, text, queue, temperature=temperature, divergence="t_v")
    loss.backward()
    assert loss.item() == pytest.approx(SCALARS["scalars"][f"sem_{name}"], abs=LOSSES)
    for which, features in (("text", text), ("image", image)):
        log_p = semantic_distribution(features, queue, temperature=temperature)
        close(log_p.exp(), PURE[f"sem.{name}.p_{which}"], DISTRIBUTIONS)
    if name != "small":
        close(image.grad[:, ::4], PURE[f"sem.{name}.grad_image"], DISTRIBUTIONS)


def test_pmc_clip_encoder():
    layout = json.loads((GOLDEN / "state_dict_pmcclip_visual.json").read_text())
    theirs = {key: R.value_for(key, tuple(shape), SEED) for key, (shape, _) in layout.items()}
    model = BioD2CVisionModel(BioD2CVisionConfig(attention_pool=True, image_size=224)).eval()
    model.load_state_dict(convert_pmc_clip_state_dict(theirs))
    seen = {}
    for name in ("avgpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda _, args, output, name=name: seen.setdefault(name, output))
    with torch.no_grad():
        features = model(R.pmcclip_inputs(SEED)["images"]).image_features
    wanted = load_file(GOLDEN / f"pmcclip_seed{SEED}.safetensors")
    close(features, wanted["image_features"])
    close(seen["avgpool"][:, ::8, ::4, ::4], wanted["stem.sub"])
    for layer in range(1, 5):
        x = seen[f"layer{layer}"]
        step = x.shape[-1] // 7
        close(x[:, ::16, ::step, ::step], wanted[f"layer{layer}.sub"])
        close(x.mean((2, 3)), wanted[f"layer{layer}.channel_mean"])


def test_official_layout_converts():
    """Every tensor of the authors' 7B file has its place: names and shapes only, nothing is allocated."""
    layout = json.loads((GOLDEN / "state_dict_biod2c_official_7b.json").read_text())
    with torch.device("meta"):
        theirs = {key: torch.empty(shape) for key, (shape, _) in layout.items()}
        ours = convert_biod2c_state_dict(theirs)
        wanted = BioD2CForConditionalGeneration(
            authors_config({k: tuple(v.shape) for k, v in theirs.items()})
        ).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in wanted.items()}
