"""`make demo`: the main job on real images, from raw files to an answer and a picture of where the model looked.

Each step is a command that a user would type; it is printed before it runs. The model is tiny and starts from nothing,
so its recipes train parts that the paper takes ready-made. Results: out/demo/{biovgq/, checkpoint/, predictions.jsonl,
scores.json, attention.png}.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent
OUTPUT = Path("out/demo")
SLAKE = ROOT / "examples/slake"
# A held-out image with its organs' masks, and what is asked of it
IMAGE, ORGAN = SLAKE / "imgs/xmlab270/source.jpg", "Liver"
QUESTIONS = ("What modality is used to take this image?", "Does the picture contain liver?", "Where is the liver?")

ASK = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
for question in sys.argv[3:]:
    inputs = processor(images=sys.argv[2], text=question)
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    print(json.dumps(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
"""


def main() -> None:
    if not SLAKE.is_dir():
        raise ValueError(f"{SLAKE}: the demo's images are in a clone of the repository, not in the installed package")
    start = time.monotonic()
    checkpoint = OUTPUT / "checkpoint"
    for stale in ("stage1", "stage2", "checkpoint", "predictions.jsonl", "run.json"):
        _remove(OUTPUT / stale)
    recipes = ROOT / "recipes/demo"
    step(
        "build the dataset",
        *("-m", "biod2c.dataset_builder", "all", recipes / "dataset.yaml", "--output", OUTPUT / "biovgq"),
    )
    step("stage 1: images and captions", ROOT / "train_hf.py", recipes / "stage1.yaml")
    step("stage 2: questions and answers, LoRA", ROOT / "train_hf.py", recipes / "stage2.yaml")
    step("merge the adapters", "-m", "biod2c.cli", "merge", OUTPUT / "stage2", checkpoint)
    step(
        "score on held-out images",
        *(ROOT / "evaluate_hf.py", "--model", checkpoint, "--data", OUTPUT / "biovgq", "--config", "slake"),
        *("--split", "validation", "--output", OUTPUT),
    )
    answers = ask_outside(checkpoint)
    draw_attention(checkpoint, OUTPUT / "attention.png")
    summarize(answers, time.monotonic() - start)


def step(title: str, *command: str | Path) -> None:
    """Run one of the project's commands, shown first; the demo stops where it fails."""
    words = [str(word) for word in command]
    print(f"\n==> {title}\n$ python {shlex.join(words)}", flush=True)
    if code := subprocess.run([sys.executable, *words]).returncode:
        raise ValueError(f"the step above ({title}) failed with exit code {code}")


def ask_outside(checkpoint: Path) -> list[tuple[str, str]]:
    """Ask through transformers' Auto classes alone, in a new process in an empty folder outside the repository."""
    print(
        "\n==> ask, through AutoModelForImageTextToText(trust_remote_code=True) in another process and folder",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            [sys.executable, "-c", ASK, checkpoint.resolve(), IMAGE, *QUESTIONS],
            cwd=elsewhere, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return list(zip(QUESTIONS, (json.loads(line) for line in result.stdout.splitlines()), strict=True))


def draw_attention(checkpoint: Path, path: Path) -> None:
    """Where the fusion decoder looked for the last question, beside the organ's true mask."""
    from .ask import generate_answer, load
    from .attention_maps import heat_maps, save_overlay

    model, processor = load(str(checkpoint))
    inputs = processor(images=IMAGE, text=QUESTIONS[-1]).to(model.device, model.dtype)
    answer = generate_answer(model, processor, inputs)
    mask = np.asarray(Image.open(IMAGE.with_name("mask.png")).convert("L")) == _grey_value(ORGAN)
    save_overlay(
        Image.open(IMAGE), heat_maps(model, inputs)[0], path, question=QUESTIONS[-1], answer=answer, reference_mask=mask
    )


def _grey_value(organ: str) -> int:
    """What SLAKE's masks write for an organ (mask.txt: one `value:organ` a line)."""
    for line in (SLAKE / "mask.txt").read_text().splitlines():
        value, _, name = line.partition(":")
        if name.strip() == organ:
            return int(value)
    raise ValueError(f"{SLAKE / 'mask.txt'}: no organ {organ}")


def summarize(answers: list[tuple[str, str]], seconds: float) -> None:
    scores = json.loads((OUTPUT / "scores.json").read_text())
    blind = scores["baselines"]
    print("\n==> done\n\nSLAKE validate, English, exact match, %      closed   open    all")
    for name, row in (
        ("majority answer", blind["majority"]),
        ("question-only lookup", blind["question_only"]),
        ("this model", scores),
    ):
        values = "".join(f"{100 * row[key]:>8.1f}" for key in ("closed_acc", "open_acc", "accuracy"))
        print(f"{name:<42}{values}")
    margin = scores["margin_over_question_only"]
    low, high = (100 * bound for bound in margin["interval"])
    print(f"over question-only lookup: {100 * margin['value']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})\n")
    print(IMAGE.relative_to(ROOT))
    for question, answer in answers:
        print(f"  {question}  {answer}")
    print()
    for name in ("biovgq/", "checkpoint/", "predictions.jsonl", "scores.json", "attention.png"):
        print(f"{OUTPUT}/{name}")
    print(f"\n{seconds / 60:.1f} minutes")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
