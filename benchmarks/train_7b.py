"""Stage 2 at the paper's size on one GPU: samples and tokens a second, MFU, peak memory, and the largest batch.

    python benchmarks/train_7b.py [--batch 8] [--rows-per-image 4] [--text-tokens 64] [--memory 24] [--peak-tflops N]

A Llama of 7B's shape with random bf16 weights, PMC-CLIP's trunk at 512 pixels, the fusion module in float32, LoRA,
bf16 autocast and AdamW, as recipes/stage2.yaml has them. Inputs are random numbers that lie on the GPU: no image is
decoded. MFU counts the matrix products that the step needs, not those that activation checkpointing repeats, against
the GPU's bf16 peak without sparsity.

It has not been run on a GPU: there was none where it was written. Without one (`--size tiny`) the same code trains a
tiny model, which shows that it works and says nothing about speed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from biod2c.configuration_biod2c import BioD2CVisionConfig
from biod2c.modeling_biod2c import BioD2CForConditionalGeneration, BioD2CVisionModel
from biod2c.training.model import parts_table, select_parts
from biod2c.training.recipe import Recipe

VOCABULARY, QUEUE, ANSWER = 32000, 30, 8  # PMC-LLaMA's, the paper's k, tokens of an answer
# language model, vision encoder, fusion; what is not named is the default, which is LLaMA-7B's and the paper's
SIZES: dict[str, tuple[dict, dict, dict]] = {
    "7b": ({}, {}, {}),
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64},
        {"num_scales": 3, "text_mlp_dim": 64, "fusion_layers": 2, "fusion_ffn_dim": 64},
    ),
}
# bf16 tensor cores, dense, from NVIDIA's data sheets, in TFLOP/s; the first name that fits
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}


def build(size: str, device: torch.device) -> PeftModel:
    language, vision, fusion = SIZES[size]
    with torch.device(device):
        model = BioD2CForConditionalGeneration.from_components(
            BioD2CVisionModel(BioD2CVisionConfig(**vision)).to(torch.bfloat16),
            AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **language), dtype=torch.bfloat16),
            image_token_id=VOCABULARY,
            semantic_queue_size=QUEUE,
            **fusion,
        )
    lora = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    recipe = Recipe(dataset="-", model="-", train=["fusion", "lora"], lora=lora)
    return select_parts(model, recipe, torch.bfloat16).to(device).train()


def random_batch(model: PeftModel, rows: int, rows_per_image: int, text_tokens: int) -> dict[str, Tensor]:
    """As AnswerCollator makes it, of rows that are equally long."""
    config, device = model.get_base_model().config, next(model.parameters()).device
    side, visual = config.vision_config.image_size, config.num_visual_tokens
    text = torch.randint(3, VOCABULARY, (rows, text_tokens), device=device)
    ids = torch.cat([torch.full((rows, visual), config.image_token_id, device=device), text], 1)
    question = torch.randint(3, VOCABULARY, (rows, visual), device=device)
    queue = torch.randint(3, VOCABULARY, (rows, QUEUE, visual), device=device)
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(-(-rows // rows_per_image), 3, side, side, device=device),
        "image_index": torch.arange(rows, device=device) // rows_per_image,
        "question_input_ids": question,
        "question_attention_mask": torch.ones_like(question),
        "queue_input_ids": queue,
        "queue_attention_mask": torch.ones_like(queue),
        "labels": labels,
    }


def loss_and_gradients(model: PeftModel, batch: dict[str, Tensor]) -> None:
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()


class Bench:
    """A model with its optimizer, and what one step of it costs."""

    def __init__(self, model: PeftModel, rows_per_image: int, text_tokens: int) -> None:
        self.model, self.rows_per_image, self.text_tokens = model, rows_per_image, text_tokens
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=1e-3)
        self.on_gpu = self.trained[0].is_cuda

    def batch(self, rows: int) -> dict[str, Tensor]:
        return random_batch(self.model, rows, self.rows_per_image, self.text_tokens)

    def flops_a_row(self) -> float:
        """Of the rows of one image, without what activation checkpointing repeats."""
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(self.model, self.batch(self.rows_per_image))
        self.optimizer.zero_grad()
        return counter.get_total_flops() / self.rows_per_image

    def step(self, batch: dict[str, Tensor]) -> None:
        loss_and_gradients(self.model, batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.on_gpu:
            torch.cuda.synchronize()

    def measure(self, rows: int, repeats: int) -> tuple[float, float]:
        """Median seconds of a step, and peak GiB (0 without a GPU)."""
        batch, seconds = self.batch(rows), []
        for _ in range(2):  # the first makes the optimizer's state
            self.step(batch)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            start = time.perf_counter()
            self.step(batch)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0

    def fits(self, rows: int) -> bool:
        """Whether a step of so many rows stays within the process's share of the GPU."""
        try:
            self.step(self.batch(rows))
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        return fits


def largest(fits: Callable[[int], bool], unit: int) -> int:
    """The largest multiple of `unit` that fits, 0 if none: doubled until it does not, then halved in between."""
    low, high = 0, unit
    while fits(high):
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(bench: Bench, gib: float) -> int:
    """The largest batch on a GPU of so many GiB, one of which is the driver's."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - 1) * 2**30 / total))
    rows = largest(bench.fits, bench.rows_per_image)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="7b" if gpu else "tiny")
    parser.add_argument("--batch", type=int, default=8, help="rows, a multiple of --rows-per-image")
    parser.add_argument("--rows-per-image", type=int, default=4)
    parser.add_argument("--text-tokens", type=int, default=64, help="of a prompt and its answer, beside the image's 32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=float, default=24, help="GiB of the GPU for which the largest batch is sought")
    parser.add_argument("--peak-tflops", type=float, help="bf16 peak of a GPU that is not in the table")
    options = parser.parse_args()

    name = torch.cuda.get_device_name() if gpu else "CPU"
    peak = options.peak_tflops or next((tflops for key, tflops in PEAKS.items() if key in name), None)
    torch.manual_seed(0)
    model = build(options.size, torch.device("cuda" if gpu else "cpu"))
    bench = Bench(model, options.rows_per_image, options.text_tokens)
    columns, flops = model.get_base_model().config.num_visual_tokens + options.text_tokens, bench.flops_a_row()
    print(f"{parts_table(model)}\n")
    print(
        f"torch {torch.__version__}, {name}, {options.size}, bf16; {options.batch} rows of {columns} tokens, ", end=""
    )
    print(f"{options.rows_per_image} an image; {flops / 1e12:.4f} TFLOP a row")
    if not gpu:
        print("no GPU: the size is tiny unless --size says otherwise; memory is not measured")
    largest_column = f"rows in {options.memory:g} GiB"
    print(f"{'':<34}{'samples/s':>11}{'tokens/s':>11}{'MFU':>8}{'peak GiB':>10}{largest_column:>17}")
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        seconds, gib = bench.measure(options.batch, options.repeats)
        speed = options.batch / seconds
        mfu = f"{speed * flops / peak / 1e12:.1%}" if peak else "-"
        rows = largest_batch(bench, options.memory) if gpu else "-"
        label = "activation checkpointing" if checkpointing else "no activation checkpointing"
        print(f"{label:<34}{speed:>11.2f}{speed * columns:>11.0f}{mfu:>8}{gib or '-':>10.4}{rows:>17}")


if __name__ == "__main__":
    main()
