"""One optimizer step of stage 2 beside the authors' code, in one run: samples a second and peak memory, as ratios.

    python benchmarks/train.py [--authors CLONE] [--repeats 1] [--threads 1] [--samples 64] [--rows-per-image 4]
        [--width 512] [--layers 8]

CLONE is a clone of github.com/jzy-123/BioD2C. Without it, ours is measured alone. Both sides train through the
transformers Trainer on the same real SLAKE rows (batches of 8, accumulated to --samples), on the same weights, in
float32; the time runs from reading the first image to the end of the optimizer's step. Each measurement has a process
of its own, so that peak memory is its own. Before anything is timed, both sides' losses of the same rows are compared.

The same on both sides: PMC-CLIP's trunk at 512 pixels and the fusion decoder in full size, LoRA of rank 8, the semantic
loss against 10 texts, AdamW, and a random Llama, far smaller than 7B. The larger it is (--width, --layers), the more
their 544 columns a row weigh against our 60 or so.

As published on their side: models/*.py, and of train_stage2.py the Trainer, which freezes the trunk, and all defaults,
such as activation checkpointing in the language model. Replaced, because it could not run here:
- PMC-LLaMA by the random Llama, and reading PMC-CLIP's checkpoint by nothing: the weights come from tests/golden.
- Their data set class, which calls a method that it lacks, by `AuthorsRows`: the same tensors, but images without the
  random crop and colours, so that losses can be compared, and the queue without BOS.
- `import torchvision`, which nothing then uses, and the argument voc_size, which is read and missing. einops is needed.
- Two GPUs that accumulate 4 batches each by one process that accumulates 8.

Different by design, on our side: recipes/stage2.yaml's rows_per_image (an image is decoded and encoded once for its
questions in a batch), batches padded to their longest row, BatchNorm of the frozen trunk in eval mode. Activation
checkpointing is measured as the authors have it, in the language model, without any, and as the recipe has it: in the
fusion decoder as well, which saves memory beside 7B and costs time here.
"""

import argparse
import json
import logging
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from biod2c.convert_checkpoint import DEAD, authors_config, convert_biod2c_state_dict
from biod2c.dataset_builder.build import build
from biod2c.dataset_builder.recipe import read_recipe
from biod2c.image_processing_biod2c import BioD2CImageProcessor
from biod2c.modeling_biod2c import BioD2CForConditionalGeneration
from biod2c.processing_biod2c import AUTHORS_CHAT_TEMPLATE, BioD2CProcessor
from biod2c.training.data import AnswerCollator
from biod2c.training.model import select_parts, train_tokenizer
from biod2c.training.recipe import load_recipe
from biod2c.training.rows import load_rows
from biod2c.training.trainer import BioD2CTrainer

AUTHORS = "authors' code, checkpointing: language model"
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, QUEUE, IMAGE_TOKENS, COLUMNS, BATCH = 1500, 10, 32, 512, 8
COMPARED, TOLERANCE = 4, 1e-4  # rows whose losses are compared one by one, in nats


@dataclass(frozen=True)
class Setup:
    """What every process of a run needs to know; `folder` holds the rows' data set, tokenizer, Llama and weights."""

    folder: Path
    authors: Path | None
    threads: int
    samples: int
    rows_per_image: int
    width: int
    layers: int

    def arguments(self) -> dict[str, Any]:
        """What both Trainers are told; the learning rate and weight decay are those of both stage 2 recipes."""
        return {
            "output_dir": str(self.folder / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": self.samples // BATCH,
            "learning_rate": 2e-5,
            "weight_decay": 1e-3,
            "lr_scheduler_type": "cosine",
            "dataloader_pin_memory": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }


class Step(NamedTuple):
    """One optimizer step: seconds, the processor's seconds, and peak MiB of the process (of the GPU, if there is one).

    What else runs on the machine stretches the first, and much less the second.
    """

    seconds: float
    cpu_seconds: float
    peak: float


class Clock(TrainerCallback):
    """Times from the first batch's loading to the end of the step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter(), time.process_time()


def step(trainer: Trainer) -> Step:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    return Step(clock.end[0] - clock.start[0], clock.end[1] - clock.start[1], peak)


def prepare(setup: Setup) -> None:
    """The data set, a tokenizer and, for the authors' side, a Llama and one set of weights under their names."""
    build(read_recipe(ROOT / "recipes/demo/dataset.yaml"), setup.folder / "biovgq")
    rows = pick_rows(setup)
    texts = [text for row in rows.remove_columns("image") for text in (row["question"], row["answer"], *row["queue"])]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.eos_token = tokenizer.bos_token  # as in the authors' code
    tokenizer.save_pretrained(setup.folder / "tokenizer")
    if setup.authors:
        LlamaForCausalLM(llama_config(setup, len(tokenizer))).save_pretrained(setup.folder / "llama")
        weights = authors_model(setup).state_dict()
        sys.path.insert(0, str(ROOT / "tests/golden"))
        recipe, live = import_module("recipe"), {key: weights[key] for key in weights if not DEAD.search(key)}
        save_file({key: recipe.value_for(key, tuple(live[key].shape), 0) for key in live}, setup.folder / "weights")


def llama_config(setup: Setup, vocab_size: int) -> LlamaConfig:
    width = setup.width
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 11 * width // 4}
    heads, tokens = width // 128, {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaConfig(**sizes, **tokens, num_hidden_layers=setup.layers, num_attention_heads=heads)


def stage2(setup: Setup) -> tuple[Any, Any]:
    """recipes/stage2.yaml on our data and in float32."""
    changes = {
        "dataset": str(setup.folder / "biovgq"),
        "sources": ["slake"],
        "rows_per_image": setup.rows_per_image,
        "dataloader_num_workers": 0,
        "bf16": False,
        "warmup_steps": 0,
        **setup.arguments(),
    }
    words = [f"--{name}={json.dumps(value)}" for name, value in changes.items()]
    recipe, arguments, _ = load_recipe(ROOT / "recipes/stage2.yaml", words)
    arguments.remove_unused_columns = False
    return recipe, arguments


def pick_rows(setup: Setup) -> Any:
    """Random images, and of each as many random questions as stand together in a batch."""
    rows = load_rows(stage2(setup)[0], "train")
    questions: dict[str, list[int]] = {}
    for number, (image, queue) in enumerate(zip(rows["image_sha256"], rows["queue"], strict=True)):
        if len(queue) >= QUEUE:
            questions.setdefault(image, []).append(number)
    draw, chosen = random.Random(0), []
    for image in draw.sample(sorted(questions), len(questions)):
        chosen += draw.sample(questions[image], min(setup.rows_per_image, len(questions[image])))
    return rows.select(chosen[: setup.samples])


def our_processor(setup: Setup) -> BioD2CProcessor:
    return BioD2CProcessor(
        BioD2CImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD),
        AutoTokenizer.from_pretrained(setup.folder / "tokenizer"),
        question_template="{bos}Question: {question} Answer:",
        chat_template=AUTHORS_CHAT_TEMPLATE,
    )


def our_model(setup: Setup, processor: BioD2CProcessor) -> BioD2CForConditionalGeneration:
    """In the authors' form, as `biod2c convert` makes it; their LoRA merged. Random weights without their side."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(setup, processor.image_token_id)).state_dict()
    config = authors_config({f"llamacasual.{name}": tuple(weight.shape) for name, weight in llama.items()})
    if not setup.authors:
        return BioD2CForConditionalGeneration(config)
    weights = convert_biod2c_state_dict(load_file(setup.folder / "weights"))
    return BioD2CForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)


def our_losses(setup: Setup) -> list[float]:
    processor, rows = our_processor(setup), pick_rows(setup)
    model, collate = our_model(setup, processor).eval(), AnswerCollator(processor, QUEUE)
    with torch.no_grad():
        return [model(**collate([rows[number]])).loss.item() for number in range(COMPARED)]


def our_step(setup: Setup, checkpointing: str) -> Step:
    recipe, arguments = stage2(setup)
    arguments.activation_checkpointing = checkpointing == "all"
    set_seed(0)
    processor = our_processor(setup)
    model = our_model(setup, processor)
    if checkpointing == "language model":
        model.language_model.activation_checkpointing_enable()
    trainer = BioD2CTrainer(
        model=select_parts(model, recipe),
        args=arguments,
        train_dataset=pick_rows(setup),
        data_collator=AnswerCollator(processor, QUEUE),
        processing_class=processor,
        rows_per_image=recipe.rows_per_image,
    )
    return step(trainer)


def authors_script(setup: Setup) -> ModuleType:
    """Their train_stage2.py, imported."""
    stand_ins = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.models", "Datasets", "Datasets.BIoVGQ")
    }
    stand_ins["Datasets.BIoVGQ"].BioVGQ = AuthorsRows
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
    sys.path.insert(0, str(setup.authors))
    sys.modules.update(stand_ins)
    script = import_module("train_stage2")
    for name in stand_ins:
        del sys.modules[name]
    return script


def authors_model(setup: Setup) -> Any:
    script = authors_script(setup)
    script.QA_model.vision_load_pretrain = lambda self, trunk, path: trunk
    arguments = script.ModelArguments(model_path=str(setup.folder / "llama"), hidden_dim=setup.width)
    arguments.voc_size = None  # read, never used, and missing in their script
    return script.QA_model(arguments)


class AuthorsRows(torch.utils.data.Dataset):
    """Our rows as the tensors that the authors' data set class makes: ids padded to 512, images at 512 x 512."""

    def __init__(self, setup: Setup) -> None:
        self.rows, self.tokenizer = pick_rows(setup), AutoTokenizer.from_pretrained(setup.folder / "tokenizer")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        image = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255
        mean, std = (
            torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None],
            torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None],
        )
        prompt = f"<s>Question: {row['question']} Answer:"
        ids = self._ids(f"{prompt} {row['answer']}<s>", COLUMNS)
        labels = ids.masked_fill(ids == 0, -100)
        labels[: len(self.tokenizer(prompt)["input_ids"])] = -100
        return {
            "input_ids": ids,
            "images": (pixels - mean) / std,
            "labels": torch.cat([torch.full((IMAGE_TOKENS,), -100), labels]),
            "queue_text": torch.stack([self._ids(text, IMAGE_TOKENS) for text in row["queue"][:QUEUE]]),
            "pre_text": self._ids(prompt, IMAGE_TOKENS),
        }

    def _ids(self, text: str, length: int) -> Tensor:
        ids = self.tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
        return torch.tensor(ids)


def load_weights(model: Any, setup: Setup) -> Any:
    left_out = model.load_state_dict(load_file(setup.folder / "weights"), strict=False)
    assert not left_out.unexpected_keys and all(map(DEAD.search, left_out.missing_keys)), left_out
    return model


def authors_losses(setup: Setup) -> list[float]:
    model, rows = load_weights(authors_model(setup), setup).eval(), AuthorsRows(setup)
    with torch.no_grad():
        return [model(**{k: v[None] for k, v in rows[number].items()}).loss.item() for number in range(COMPARED)]


def authors_step(setup: Setup) -> Step:
    set_seed(0)
    script, model = authors_script(setup), load_weights(authors_model(setup), setup)
    arguments = script.TrainingArguments(**setup.arguments())
    return step(script.VQATrainer(model=model, args=arguments, train_dataset=AuthorsRows(setup)))


def quietly(function: Callable[..., Any], setup: Setup, *arguments: Any) -> Any:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(setup.threads)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return function(setup, *arguments)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(quietly, function, *arguments).result()


def compare_losses(setup: Setup) -> None:
    both = zip(in_own_process(our_losses, setup), in_own_process(authors_losses, setup), strict=True)
    for number, (our, their) in enumerate(both):
        print(f"row {number}: loss {their:.6f} theirs, {our:.6f} ours")
        if abs(our - their) > TOLERANCE:
            raise SystemExit(f"more than {TOLERANCE} apart: the sides do not compute the same, and nothing is timed")


def report(name: str, steps: list[Step], theirs: list[Step], samples: int) -> None:
    seconds, cpu, peak = (statistics.median(column) for column in zip(*steps, strict=True))
    line = f"{name:<48}{samples / seconds:>10.3f}{cpu:>8.0f}{peak:>10.0f}"
    if theirs:
        pairs = list(zip(theirs, steps, strict=True))
        times, cpus, peaks = (sorted(their[i] / our[i] for their, our in pairs) for i in range(3))
        line += f"{statistics.median(times):>7.1f}x  ({times[0]:.1f} to {times[-1]:.1f})"
        line += f"{statistics.median(cpus):>8.1f}x{statistics.median(peaks):>9.1f}x"
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--authors", type=Path, help="a clone of github.com/jzy-123/BioD2C")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--samples", type=int, help="of a step, a multiple of 8 (64 beside the authors' code, else 8)")
    parser.add_argument("--rows-per-image", type=int, default=4)
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    options = parser.parse_args()

    authors = options.authors and options.authors.resolve()
    samples = options.samples or (64 if authors else BATCH)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {device}, float32; {options.repeats} repeat(s) of one optimizer step:")
    print(f"{samples} rows, {BATCH} a batch, {options.rows_per_image} an image; ", end="")
    print(f"Llama of width {options.width}, {options.layers} layers")
    runs: dict[str, tuple[Any, ...]] = {
        f"ours, checkpointing: {checkpointing}": (our_step, checkpointing)
        for checkpointing in ("language model", "none", "all")
    }
    runs |= {AUTHORS: (authors_step,)} if authors else {}
    steps: dict[str, list[Step]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.threads, samples, options.rows_per_image, options.width, options.layers)
        setup = Setup(Path(folder), authors, *sizes)
        in_own_process(prepare, setup)
        if authors:
            compare_losses(setup)
        for _ in range(options.repeats):  # in turns, so that a noisy neighbour hits all
            for name, (function, *arguments) in runs.items():
                steps[name].append(in_own_process(function, setup, *arguments))
                print("{}: {:.1f} s, {:.1f} CPU s, {:.0f} MiB".format(name, *steps[name][-1]), flush=True)
    ratios = "   faster  (range)    by CPU   memory" if authors else "   (--authors CLONE: beside the authors' code)"
    print(f"\n{'median':<48}{'samples/s':>10}{'CPU s':>8}{'peak MiB':>10}{ratios}")
    for name in runs:
        report(name, steps[name], steps.get(AUTHORS, []) if name != AUTHORS else [], samples)


if __name__ == "__main__":
    main()
