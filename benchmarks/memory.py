"""Memory of the full-size recipes, computed without a GPU and without weights: the table in docs/training.md.

    python benchmarks/memory.py [--tokens 200]

Weights, gradients and optimizer states are counted from the model that training itself would build, of PMC-CLIP's and
LLaMA-7B's sizes, on torch's meta device. Activations come from a forward and a backward pass on torch's fake tensors,
which have shapes, dtypes and lifetimes but no bytes: the most that is alive at once beside weights and gradients.
tests/training/test_memory.py compares them with what the same pass allocates on real tensors.

Not counted: the CUDA context, NCCL's buffers, what a kernel needs inside, and what the allocator loses between blocks;
MARGIN stands for them. The fake tensors are a CPU's, whose autocast leaves softmax and LayerNorm in 16 bits where a
GPU's takes 32: little with activation checkpointing, a few hundred MB of the fusion decoder's without.
"""

import argparse
import json
import os
import shlex
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

from biod2c.configuration_biod2c import BioD2CConfig
from biod2c.modeling_biod2c import BioD2CForConditionalGeneration
from biod2c.training.model import frozen_dtype, select_parts
from biod2c.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
GIB = 2**30
MARGIN = 2 * GIB
TOKENS = 200
COLUMNS = ("weights", "gradients", "optimizer", "activations", "total")
NODE = 8  # GPUs in one machine, at most
# half a byte a weight, a byte for each block of 64, a float32 for each 256 of those
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Setting:
    """`train_hf.py RECIPE [overrides] [--deepspeed ZERO]` on so many GPUs of so many GB each."""

    name: str
    gpus: int
    gigabytes: int
    recipe: str
    overrides: tuple[str, ...] = ()
    zero: str | None = None

    @property
    def zero_optimization(self) -> dict[str, Any] | None:
        return json.loads((RECIPES / self.zero).read_text())["zero_optimization"] if self.zero else None


def overrides(line: str) -> tuple[str, ...]:
    return tuple(shlex.split(line))


# each makes batches of 128, as 4 GPUs with the recipe's own 8 x 4 do
ONE_GPU = overrides("--gradient_accumulation_steps 16")
QUANTIZED = overrides("--quantization '{load_in_4bit: true}'")
EIGHT_GPUS = overrides("--per_device_train_batch_size 16 --gradient_accumulation_steps 1")
SIXTEEN_GPUS = overrides("--gradient_accumulation_steps 1")
KEEP = overrides("--activation_checkpointing false")
FULL = overrides("--train '[fusion, language_model]' --output_dir out/full")
SETTINGS = [
    Setting("stage 1", 1, 24, "stage1.yaml", ONE_GPU),
    Setting("stage 2, LoRA", 1, 24, "stage2.yaml", ONE_GPU),
    Setting("stage 2, QLoRA", 1, 24, "stage2.yaml", ONE_GPU + QUANTIZED),
    Setting("stage 1", 4, 24, "stage1.yaml", (), "zero2.json"),
    Setting("stage 2, LoRA", 4, 24, "stage2.yaml", (), "zero2.json"),
    Setting("stage 2, full", 4, 24, "stage2.yaml", FULL, "zero2.json"),
    Setting("stage 1", 8, 80, "stage1.yaml", EIGHT_GPUS + KEEP),
    Setting("stage 2, LoRA", 8, 80, "stage2.yaml", EIGHT_GPUS + KEEP),
    Setting("stage 2, full", 8, 80, "stage2.yaml", EIGHT_GPUS + FULL),
    Setting("stage 2, full", 8, 80, "stage2.yaml", EIGHT_GPUS + FULL, "zero2.json"),
    Setting("stage 2, full", 8, 80, "stage2.yaml", EIGHT_GPUS + FULL, "zero3.json"),
    Setting("stage 2, full", 16, 80, "stage2.yaml", SIXTEEN_GPUS + FULL, "zero3.json"),
]


@dataclass
class Memory:
    """Bytes on one GPU; `host` those of a machine for all its processes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


class PeakMemory(TorchDispatchMode):
    """Within, `peak` is the most bytes that tensors made there took at once, on top of the tensors `known` before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch gives one storage one object for as long as it lives
        if key in self.known or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def make_batch(config: BioD2CConfig, rows: int, tokens: int) -> dict[str, Tensor]:
    """One image a row; the second half of the tokens is answer."""
    question, queue = config.num_question_tokens, config.semantic_queue_size
    side = config.vision_config.image_size
    shapes = {
        "input_ids": (rows, tokens),
        "attention_mask": (rows, tokens),
        "labels": (rows, tokens),
        "question_input_ids": (rows, question),
        "question_attention_mask": (rows, question),
        "queue_input_ids": (rows, queue, question),
        "queue_attention_mask": (rows, queue, question),
    }
    batch = {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    pixels, answer_columns = torch.zeros(rows, 3, side, side), torch.arange(tokens // 2, tokens)
    return {**batch, "pixel_values": pixels, "logits_to_keep": answer_columns}


def step(model: nn.Module, rows: int, tokens: int) -> None:
    """Forward and backward under autocast, as every recipe has it, with DeepSpeed and without."""
    batch = make_batch(model.config, rows, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()


def step_peak(model: nn.Module, rows: int, tokens: int) -> int:
    """Bytes that a forward and backward pass of a model of fake tensors needs at most, beside weights and gradients."""
    learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learn:
        parameter.grad = torch.empty_like(parameter)  # accumulation goes on
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in learn)]
    # how many placeholders a row has cannot be asked of tensors without values
    with patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"), PeakMemory(known) as memory:
        step(model, rows, tokens)
    return memory.peak


def build(recipe_file: str, overrides: tuple[str, ...], **fields: Any) -> tuple[nn.Module, Recipe, TrainingArguments]:
    """The model that a recipe trains, as shapes; `fields` are `BioD2CConfig`'s, whose defaults are the full size."""
    recipe, arguments, _ = load_recipe(RECIPES / recipe_file, ["--use_cpu", "true", *overrides])
    dtype = frozen_dtype(recipe, arguments)
    with torch.device("meta"):
        model = BioD2CForConditionalGeneration(BioD2CConfig(**{**fields, **recipe.config}))
        model.language_model.to(dtype)  # also where it will be of 4 bits, which are computed with in these
        model = select_parts(model, recipe, dtype)
    return model, recipe, arguments


@cache
def activations(recipe_file: str, overrides: tuple[str, ...], tokens: int) -> int:
    model, recipe, arguments = build(recipe_file, overrides)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if arguments.activation_checkpointing:
            model.activation_checkpointing_enable()
        peak = step_peak(model.train(), arguments.per_device_train_batch_size, tokens)
    # a layer of 4 bits is unpacked when it is used
    return peak + (2 * max(layer.weight.numel() for layer in quantized_layers(model)) if recipe.quantization else 0)


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The language model's linear layers but for its head and the adapters."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.model." in name and ".lora_" not in name
    ]


def model_states(model: nn.Module, gpus: int, zero: dict[str, Any] | None, quantized: bool = False) -> Memory:
    """Weights, gradients and AdamW's states; `zero` is the `zero_optimization` of DeepSpeed's file."""
    learn = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    weights: float = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if quantized:
        weights -= sum(layer.weight.numel() * (2 - NF4_BYTES) for layer in quantized_layers(model))
    if zero is None:
        copies = 2 if gpus > 1 else 1  # DDP sums gradients in buckets of its own
        return Memory(weights, 4 * copies * sum(learn), 8 * sum(learn))
    # DeepSpeed's optimizer has a copy of the weights; ZeRO-2 accumulates gradients beside those of the last batch
    share, copies = sum(learn) / gpus, 2 if zero["stage"] == 2 else 1
    gradients, optimizer = 4 * copies * share, 12 * share
    if "offload_optimizer" in zero:
        gradients, optimizer = 4 * max(learn), 0  # the largest one, on its way
    if zero["stage"] == 3:
        everything = sum(parameter.numel() for parameter in model.parameters())
        gathered = min(1, zero.get("stage3_max_live_parameters", 1e9) / everything)
        weights = weights / gpus + weights * gathered
    return Memory(weights, gradients + 2 * 4 * bucket_size(model, zero), optimizer)  # one bucket is summed, one fills


def bucket_size(model: nn.Module, zero: dict[str, Any]) -> int:
    """How many gradients DeepSpeed sums at a time; transformers replaces "auto"."""
    size = zero.get("reduce_bucket_size", 5e8)
    return model.config.text_config.hidden_size**2 if size == "auto" else int(size)


def host_memory(model: nn.Module, one_process: Memory, setting: Setting) -> float:
    """Each process builds its model in the host's memory, before DeepSpeed's optimizer may be put there."""
    # takes seconds, and not all tests need it
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    processes = min(setting.gpus, NODE)
    learn = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    offloaded = "offload_optimizer" in (setting.zero_optimization or {})
    optimizer = estimate_zero2_model_states_mem_needs(learn, processes)[0] if offloaded else 0
    return max(processes * one_process.weights, optimizer)


def compute(setting: Setting, tokens: int) -> Memory:
    model, recipe, _ = build(setting.recipe, setting.overrides)
    quantized = bool(recipe.quantization)
    memory = model_states(model, setting.gpus, setting.zero_optimization, quantized)
    memory.activations = activations(setting.recipe, setting.overrides, tokens)
    memory.host = host_memory(model, model_states(model, 1, None, quantized), setting)
    return memory


def row(setting: Setting, tokens: int) -> str:
    memory = compute(setting, tokens)
    _, _, arguments = build(setting.recipe, setting.overrides)
    cells = [
        setting.name,
        f"{setting.gpus} × {setting.gigabytes} GB",
        setting.zero or ("DDP" if setting.gpus > 1 else "one process"),
        f"{arguments.per_device_train_batch_size} × {arguments.gradient_accumulation_steps}",
        *(
            f"{getattr(memory, part) / GIB:.1f}"
            for part in ("weights", "gradients", "optimizer", "activations", "total")
        ),
        "yes" if memory.total + MARGIN <= setting.gigabytes * GIB else "**no**",
        f"{memory.host / GIB:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(tokens: int) -> str:
    """Markdown, in GiB."""
    head = ["run", "GPUs", "by", "batch", *COLUMNS, "fits", "host"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [row(setting, tokens) for setting in SETTINGS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="in a row: prompt, image and answer, half of it answer"
    )
    print(table(parser.parse_args().tokens))


if __name__ == "__main__":
    main()
