"""benchmarks/memory.py counts what training allocates: the same passes, weights and optimizer states, for real."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
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


def allocated_by_a_real_step(model) -> int:
    """What torch's CPU allocator handed out at most during the pass, as its profiler saw it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        memory.step(model, 4, 100)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("recipe", "overrides"), [("stage1.yaml", ()), ("stage2.yaml", ()), ("stage2.yaml", memory.FULL)]
)
def test_activations_are_what_a_real_step_allocates(recipe, overrides, checkpointing, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # the batch of ones has no placeholders
    models = [memory.build(recipe, overrides, **SMALL)[0] for _ in range(2)]
    for model in models:
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = memory.step_peak(models[0].to_empty(device="cpu"), 4, 100)
    assert expected == pytest.approx(allocated_by_a_real_step(models[1].to_empty(device="cpu")), rel=0.03)


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

    shapes, _, _ = memory.build(str(path), (), **make_config().to_dict())
    counted = memory.model_states(shapes, 1, None)
    real = [sum(tensor.nbytes for tensor in tensors) for tensors in (model.parameters(), gradients, states)]
    assert [counted.weights, counted.gradients, counted.optimizer] == real


def test_the_full_size_is_that_of_the_authors_file():
    layout = json.loads((ROOT / "tests" / "golden" / "state_dict_biod2c_official_7b.json").read_text())
    theirs = {name: math.prod(shape) for name, (shape, _) in layout.items() if name.startswith("llamacasual.")}
    model, _, _ = memory.build("stage2.yaml", ())
    ours = {name: parameter.numel() for name, parameter in model.named_parameters() if "language_model." in name}
    for is_lora in (False, True):
        totals = [sum(n for name, n in sizes.items() if (".lora_" in name) == is_lora) for sizes in (ours, theirs)]
        assert totals[0] == totals[1] > 0


def test_4_bits_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes: biod2c[quantization]")
    packed, state = functional.quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    real = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert real == memory.NF4_BYTES * 1024 * 1024


DEEPSPEED_STEPS = """
import gc, json, sys, deepspeed, torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.learns = torch.nn.Linear(1000, 1000, bias=False)
        self.frozen = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.learns(x)).float().mean()

deepspeed.init_distributed(dist_backend="gloo")
model, config = Model(), json.loads(sys.argv[1])
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW([model.learns.weight]), config=config)
peak = 0
for _ in range(4):
    engine.backward(engine(torch.ones(1, 1000)))
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    peak = max(peak, sum(storages.values()))
    engine.step()
print("peak", peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_what_deepspeed_holds(stage):
    """A frozen and a trained matrix in one process: what lives after backward, while batches accumulate."""
    pytest.importorskip("deepspeed")
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 1000}
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0} if stage == 3 else {}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    own = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions")}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", DEEPSPEED_STEPS, json.dumps(config)]
    result = subprocess.run(command, env={**os.environ, **own, **alone}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = int(re.findall(r"^peak (\d+)$", result.stdout, re.MULTILINE)[0])

    model = torch.nn.Sequential(
        torch.nn.Linear(1000, 1000, bias=False, device="meta"),
        torch.nn.Linear(1000, 1000, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(False),
    )
    assert memory.model_states(model, 1, zero).total == pytest.approx(measured, rel=0.01)


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
    rows = [line for line in DOCS.splitlines() if " GB | " in line]
    for setting, row in zip(memory.SETTINGS, rows, strict=True):
        assert ((setting.recipe, setting.overrides, setting.zero) in documented) is ("**no**" not in row), row


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_scripts():
    pytest.importorskip("deepspeed")
    assert memory.table(memory.TOKENS) in DOCS
