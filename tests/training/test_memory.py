"""benchmarks/memory.py counts what training allocates: the same passes, weights and optimizer states, for real."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from biod2c.benchmarks import memory
from biod2c.training.model import build_model, frozen_dtype, select_parts
from biod2c.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "training.md").read_text()
# large enough that what a kernel needs inside does not count, small enough for a second
SMALL = {
    "vision_config": {"layers": [1, 1, 1], "width": 16, "image_size": 128},
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 2000,
    },
    "num_visual_tokens": 8,
    "num_question_tokens": 8,
    "num_scales": 4,
    "text_mlp_dim": 256,
    "fusion_layers": 2,
    "fusion_ffn_dim": 256,
}


def small_model(setting, checkpointing):
    model, _, _ = memory.build(setting, **SMALL)
    model.to_empty(device="cpu")
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def allocated_by_a_real_step(model, autocast) -> int:
    """What torch's CPU allocator handed out at most during the pass, as its profiler saw it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        memory.step(model, 4, 100, autocast)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "setting",
    [
        memory.Setting("autocast", 1, 24, "stage1.yaml"),
        memory.Setting("autocast", 1, 24, "stage2.yaml"),
        memory.Setting("16 bits", 1, 24, "stage2.yaml", memory.FULL, "zero2.json"),
    ],
    ids=lambda setting: f"{setting.recipe} in {setting.name}",
)
def test_activations_are_what_a_real_step_allocates(setting, checkpointing, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # the batch of ones has no placeholders
    autocast = setting.zero is None
    model, _, _ = memory.build(setting, **SMALL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if checkpointing:
            model.activation_checkpointing_enable()
        expected = memory.step_peak(model.train(), 4, 100, autocast)
    assert expected == pytest.approx(allocated_by_a_real_step(small_model(setting, checkpointing), autocast), rel=0.03)


def test_states_are_those_of_a_real_model_and_optimizer(make_recipe, make_config, tiny_checkpoint):
    fields = {"model": str(tiny_checkpoint), "vocab_size": None, "config": {}, "train": ["fusion", "lora"]}
    path = make_recipe(**fields, lora={"r": 2}, bf16=True)
    recipe, arguments, _ = load_recipe(path, [])
    model = select_parts(build_model(recipe, None, arguments)[0], recipe, frozen_dtype(recipe, arguments))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    setting = memory.Setting("tiny", 1, 24, str(path))
    shapes, _, _ = memory.build(setting, **make_config().to_dict())
    counted = memory.model_states(shapes, 1, None)
    real = [sum(tensor.nbytes for tensor in tensors) for tensors in (model.parameters(), gradients, states)]
    assert [counted.weights, counted.gradients, counted.optimizer] == real


def test_the_full_size_is_that_of_the_authors_file():
    layout = json.loads((ROOT / "tests" / "golden" / "state_dict_biod2c_official_7b.json").read_text())
    theirs = {name: math.prod(shape) for name, (shape, _) in layout.items() if name.startswith("llamacasual.")}
    model, _, _ = memory.build(memory.Setting("stage 2", 1, 24, "stage2.yaml"))
    ours = {name: parameter.numel() for name, parameter in model.named_parameters() if "language_model." in name}
    for is_lora in (False, True):
        totals = [sum(n for name, n in sizes.items() if (".lora_" in name) == is_lora) for sizes in (ours, theirs)]
        assert totals[0] == totals[1] > 0


def test_4_bits_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes: biod2c[quantization]")
    packed, state = functional.quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    real = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert real == memory.NF4_BYTES * 1024 * 1024


def test_zero_2_is_what_deepspeed_estimates():
    """Of a model that trains whole; beside its estimate stand the buckets in which gradients travel."""
    estimates = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    setting = memory.Setting(
        "full", 4, 24, "stage2.yaml", ("--train", "[vision, fusion, language_model]"), "zero2.json"
    )
    model, _, _ = memory.build(setting, **SMALL)
    number = memory.number_that_learn(model)
    for offload in (True, False):
        zero = {"stage": 2, "reduce_bucket_size": 0} | ({"offload_optimizer": {}} if offload else {})
        ours = memory.model_states(model, 4, zero).total
        _, expected = estimates.estimate_zero2_model_states_mem_needs(number, 4, cpu_offload=offload)
        assert expected <= ours <= expected + 2 * 256 * 2000


def commands() -> list[list[str]]:
    code = "".join(re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in code.splitlines() if "train_hf.py" in line]


def parse(command) -> tuple[str, tuple[str, ...], str | None]:
    """Recipe, overrides and DeepSpeed's file of a documented command."""
    recipe, *words = command[command.index("train_hf.py") + 1 :]
    zero = None
    if "--deepspeed" in words:
        at = words.index("--deepspeed")
        zero = Path(words[at + 1]).name
        del words[at : at + 2]
    return Path(recipe).name, tuple(words), zero


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_documented_commands_are_understood(command):
    recipe, words, zero = parse(command)
    load_recipe(memory.RECIPES / recipe, ["--use_cpu", "true", *words])
    assert zero is None or (memory.RECIPES / zero).is_file()


def test_what_fits_stands_in_the_docs_as_a_command():
    documented = {parse(command) for command in commands()}
    rows = {line.split(" | ")[0].strip("| ") for line in DOCS.splitlines() if "**no**" in line}
    assert rows == {"stage 2, full"}
    for setting in memory.SETTINGS:
        if (setting.recipe, setting.overrides, setting.zero) not in documented:
            assert setting.zero is None and setting.overrides == memory.EIGHT_GPUS + memory.FULL


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_scripts():
    pytest.importorskip("deepspeed")
    assert memory.table(memory.TOKENS) in DOCS
