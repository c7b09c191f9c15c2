"""The whole evaluation on a small data set, with a stand-in that honours the model's public interface.

The stand-in answers by the colour it is shown, so what was shown for a question can be read off its answer.
"""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from transformers import BatchFeature

from biod2c import evaluate_hf
from biod2c.evaluate_hf import EvaluateArguments, evaluate
from biod2c.evaluation.generation import plan_batches, shown_rows

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}
ANSWERS = {(255, 0, 0): "Red", (0, 255, 0): "Green", (0, 0, 255): "Blue", (127, 127, 127): "Grey"}
TEXT_COLUMNS = ("id", "image_id", "question", "answer", "answer_type", "question_type", "source")
FEATURES = Features(
    {name: Value("string") for name in TEXT_COLUMNS}
    | {"image": Image(), "history": List({"role": Value("string"), "content": Value("string")})}
)


class StandInProcessor:
    """Characters as token ids, padded on the left with 0; remembers the texts it was given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, *, images: list, text: list[str], image_index: list[int], return_tensors: str) -> BatchFeature:
        self.texts += text
        ids = [torch.tensor([ord(character) for character in line]) for line in text]
        pixels = [torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).view(3, 1, 1) for image in images]
        return BatchFeature(
            {
                "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side="left"),
                "pixel_values": torch.stack(pixels),
                "image_index": torch.tensor(image_index),
            }
        )

    def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        names = {"image": "<image>", "text": ""}
        parts = [(turn["role"], part) for turn in messages for part in turn["content"]]
        return "|".join(f"{role}:{names[part['type']]}{part.get('text', '')}" for role, part in parts)

    def batch_decode(self, sequences: torch.Tensor, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(token) for token in line if token) for line in sequences.tolist()]


class StandInModel:
    """Names the colour of the image that a row asks; counts images and stops after a number of batches."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, batches: int = 1000) -> None:
        self.batches, self.images, self.rows = batches, 0, 0

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_index: torch.Tensor, **options: Any):
        if self.batches == 0:
            raise KeyboardInterrupt
        assert options == {"max_new_tokens": 96, "do_sample": False, "num_beams": 1}
        self.batches -= 1
        self.images += len(pixel_values)
        self.rows += len(input_ids)
        colours = [tuple(pixel_values[index].flatten().int().tolist()) for index in image_index]
        answers = [torch.tensor([ord(character) for character in f" {ANSWERS[colour]}"]) for colour in colours]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
        return torch.cat([input_ids, padded], dim=1)


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    PilImage.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(split: str) -> list[dict[str, Any]]:
    """Three questions on each of three images; on validation also one on a broken file."""
    rows = []
    for name, colour in COLOURS.items():
        colour_row = {"question": "Which colour is it?", "answer": ANSWERS[colour], "answer_type": "open"}
        red_row = {"question": "Is it red?", "answer": "Yes" if name == "red.png" else "No", "answer_type": "closed"}
        again = {"question": "What is the colour of this whole image?", "answer": ANSWERS[colour], "answer_type": None}
        for number, row in enumerate((colour_row, red_row, again)):
            rows.append(
                row
                | {"id": f"{split}-{name}-{number}", "image_id": name, "source": "paint", "history": []}
                | {"question_type": "Size" if number == 1 else "Colour", "image": {"bytes": png(colour), "path": name}}
            )
    if split == "validation":
        cut_off = {"bytes": png((1, 2, 3))[:50], "path": "broken.png"}
        rows.append({**rows[0], "id": "broken", "image_id": "broken.png", "image": cut_off})
    return rows


def write(folder: Path, rows: list[dict[str, Any]], split: str = "validation") -> None:
    folder.mkdir(exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def arguments(tmp_path: Path) -> EvaluateArguments:
    """A model folder (never loaded), a data set of two splits, an output folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write(tmp_path / "data", make_rows("train"), "train")
    write(tmp_path / "data", make_rows("validation"))
    return EvaluateArguments(model=f"{tmp_path}/model", data=f"{tmp_path}/data", output=f"{tmp_path}/out")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Call with a stand-in: evaluations then use it."""

    def use(model: StandInModel, processor: StandInProcessor | None = None) -> StandInModel:
        monkeypatch.setattr(evaluate_hf, "load_model", lambda name: (model, processor or StandInProcessor()))
        return model

    return use


def predictions(arguments: EvaluateArguments) -> dict[str, dict[str, Any]]:
    lines = (Path(arguments.output) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_scores_predictions_and_baselines(arguments: EvaluateArguments, load) -> None:
    model = load(StandInModel())
    scores = evaluate(arguments)
    assert json.loads((Path(arguments.output) / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert (scores["n_closed"], scores["n_open"], scores["n_failed"], scores["n_images"]) == (3, 7, 1, 4)
    assert (scores["closed_acc"], scores["open_acc"], scores["accuracy"]) == (0, pytest.approx(6 / 7), 0.6)
    assert scores["intervals"].keys() == {"closed_acc", "open_acc", "accuracy", "bleu1", "rouge1"}
    assert scores["convention"] == "strict"
    # blind: "No" is right twice, the first colour met (Red) twice, and once more on the broken image's row
    assert scores["baselines"]["question_only"]["accuracy"] == 0.5
    assert scores["baselines"]["majority"]["closed_acc"] == pytest.approx(2 / 3)
    assert scores["margin_over_question_only"]["value"] == pytest.approx(0.1)
    assert scores["by_question_type"]["Colour"] | {"interval": None} == {
        "n": 7, "accuracy": pytest.approx(6 / 7), "interval": None, "question_only": pytest.approx(3 / 7),
    }  # fmt: skip
    assert (model.images, model.rows) == (3, 9)  # each image once, the broken one never
    record = predictions(arguments)["validation-green.png-0"]
    assert record == {
        "id": "validation-green.png-0", "question": "Which colour is it?", "answer": "Green", "prediction": "Green",
        "answer_type": "open", "question_type": "Colour", "organ": None, "modality": None, "language": None,
        "image_id": "green.png", "source": "paint", "error": None,
    }  # fmt: skip


def test_a_broken_image_fails_its_row_with_the_reason(arguments: EvaluateArguments, load) -> None:
    rows = make_rows("validation")
    rows += [
        {**rows[0], "id": "none", "image_id": "none.png", "image": None},
        {**rows[0], "id": "text", "image_id": "text.png", "image": {"bytes": b"text", "path": "text.png"}},
        {**rows[0], "id": "silent", "question": " "},
    ]
    write(Path(arguments.data), rows)
    load(StandInModel())
    scores = evaluate(arguments)
    errors = {name: record["error"] for name, record in predictions(arguments).items() if record["error"]}
    assert errors == {
        "broken": "image: the image is damaged or cut off (image file is truncated)",
        "none": "the row has no image",
        "text": "image: not an image that can be read here; convert it to PNG or JPEG",
        "silent": "the question is empty",
    }
    assert predictions(arguments)["broken"]["prediction"] == ""
    assert scores["n_failed"] == 4
    assert scores["n_closed"] + scores["n_open"] == 13


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_batches_change_nothing(arguments: EvaluateArguments, load, batch_size: int) -> None:
    arguments.batch_size = batch_size
    model = load(StandInModel())
    assert evaluate(arguments)["accuracy"] == 0.6
    assert model.images == 3


def test_continues_where_it_was_killed(arguments: EvaluateArguments, load) -> None:
    arguments.batch_size = 4
    load(StandInModel(batches=2))
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments)
    path = Path(arguments.output) / "predictions.jsonl"
    before = path.read_text()
    path.write_text(before + '{"id": "validation-bl')  # a line cut short
    model = load(StandInModel())
    assert evaluate(arguments)["accuracy"] == 0.6
    assert path.read_text().startswith(before)
    assert len(predictions(arguments)) == 10
    assert model.rows == 9 - before.count('"error": null')
    load(StandInModel(batches=0))
    assert evaluate(arguments)["accuracy"] == 0.6  # all answered: nothing is asked again


def test_a_larger_limit_continues(arguments: EvaluateArguments, load) -> None:
    arguments.limit = 3
    load(StandInModel())
    scores = evaluate(arguments)
    assert scores["n_closed"] + scores["n_open"] == 3
    arguments.limit = None
    model = load(StandInModel())
    assert evaluate(arguments)["accuracy"] == 0.6
    assert model.rows == 6


def test_another_run_needs_another_output(arguments: EvaluateArguments, load) -> None:
    load(StandInModel())
    evaluate(arguments)
    arguments.image = "blank"
    with pytest.raises(ValueError, match=r"image was normal, now blank.*choose another --output"):
        evaluate(arguments)
    arguments.image = "normal"
    (Path(arguments.model) / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"another run \(model was \w{12}, now \w{12}\)"):
        evaluate(arguments)
    (Path(arguments.model) / "model.safetensors").unlink()
    rows = make_rows("validation")
    rows[0]["image"] = rows[4]["image"]
    write(Path(arguments.data), rows)
    with pytest.raises(ValueError, match=r"another run \(data was \w{12}, now \w{12}\)"):
        evaluate(arguments)
    (Path(arguments.output) / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json that says what made them"):
        evaluate(arguments)


def test_blank_and_shuffled_images_show_what_sight_is_worth(arguments: EvaluateArguments, load) -> None:
    load(StandInModel())
    arguments.image, arguments.output = "blank", f"{arguments.output}-blank"
    evaluate(arguments)
    assert {record["prediction"] for record in predictions(arguments).values()} == {"Grey", ""}
    write(Path(arguments.data), make_rows("validation")[:9])
    arguments.image, arguments.output = "shuffled", f"{arguments.output}-shuffled"
    assert evaluate(arguments)["accuracy"] == 0
    assert {record["prediction"] for record in predictions(arguments).values()} == {"Red", "Green", "Blue"}


def test_earlier_turns_are_part_of_the_prompt(arguments: EvaluateArguments, load) -> None:
    rows = make_rows("validation")[:2]
    rows[0]["history"] = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Paint."}]
    write(Path(arguments.data), rows)
    processor = StandInProcessor()
    load(StandInModel(), processor)
    evaluate(arguments)
    dialogue = "user:<image>|user:What is it?|assistant:Paint.|user:Which colour is it?"
    assert sorted(processor.texts) == ["Is it red?", dialogue]


def test_without_a_training_split_there_are_no_baselines(arguments: EvaluateArguments, load) -> None:
    (Path(arguments.data) / "train.parquet").unlink()
    load(StandInModel())
    scores = evaluate(arguments)
    assert scores["baselines"] is scores["margin_over_question_only"] is None
    assert scores["by_question_type"]["Size"]["question_only"] is None


def test_only_open_rows_leave_closed_accuracy_empty(arguments: EvaluateArguments, load) -> None:
    write(Path(arguments.data), make_rows("validation")[:1])
    load(StandInModel())
    scores = evaluate(arguments)
    assert scores["closed_acc"] is scores["intervals"]["closed_acc"] is None


def test_command_line_prints_the_table(arguments: EvaluateArguments, load, capsys) -> None:
    load(StandInModel())
    command = ["--model", arguments.model, "--data", arguments.data, "--output", arguments.output, "--batch_size", "2"]
    assert evaluate_hf.main(command) == 0
    printed = capsys.readouterr().out
    assert "10 questions (3 closed, 7 open) on 4 images, 1 failed; convention strict" in printed
    assert "over question-only: +10.0 points" in printed


def test_script_with_a_saved_checkpoint(arguments: EvaluateArguments, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Run from another folder, in batches, the script answers as the model does for each question alone."""
    rows = make_rows("validation")
    rows[0]["history"] = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Paint."}]
    write(Path(arguments.data), rows)
    command = [sys.executable, evaluate_hf.__file__, "--model", str(tiny_checkpoint), "--data", arguments.data]
    subprocess.run([*command, "--output", arguments.output], cwd=tmp_path, check=True, capture_output=True)
    records = predictions(arguments)
    assert records.pop("broken")["error"].startswith("image: the image is damaged")

    model, processor = evaluate_hf.load_model(str(tiny_checkpoint))
    for row in rows[:-1]:
        text = row["question"]
        if row["history"]:
            text = "<image>Question: What is it? Answer: Paint.</s>Question: Which colour is it? Answer:"
        inputs = processor(images=PilImage.open(BytesIO(row["image"]["bytes"])), text=text)
        sequence = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        alone = processor.batch_decode(sequence[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert records[row["id"]]["prediction"] == alone.strip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**rows[0], "id": rows[1]["id"]}, rows[1]], "1 ids stand on several rows"),
        (lambda rows: [{key: value for key, value in rows[0].items() if key != "answer"}], "no column answer"),
    ],
)
def test_unusable_rows(arguments: EvaluateArguments, load, change, message: str) -> None:
    rows = change(make_rows("validation"))
    features = Features({name: feature for name, feature in FEATURES.items() if name in rows[0]})
    Dataset.from_list(rows, features=features).to_parquet(Path(arguments.data) / "validation.parquet")
    (Path(arguments.data) / "train.parquet").unlink()
    with pytest.raises(ValueError, match=message):
        evaluate(arguments)


def test_unusable_arguments(arguments: EvaluateArguments) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        EvaluateArguments(model="m", data="d", output="o", batch_size=0)
    with pytest.raises(ValueError, match="image must be one of normal, blank, shuffled"):
        EvaluateArguments(model="m", data="d", output="o", image="dark")  # type: ignore[arg-type]
    arguments.split = "test"
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        evaluate(arguments)


IMAGES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30)


@given(IMAGES, st.integers(1, 8), st.data())
def test_batches_hold_whole_images(images: list[str], batch_size: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(images), max_size=len(images)))
    batches = plan_batches(images, lengths, batch_size)
    assert sorted(position for batch in batches for position in batch) == list(range(len(images)))
    asked = [{images[position] for position in batch} for batch in batches]
    assert sum(map(len, asked)) == len(set(images))  # no image in two batches
    assert all(len(batch) <= batch_size or len(names) == 1 for batch, names in zip(batches, asked, strict=True))


@given(IMAGES)
def test_shown_rows(images: list[str]) -> None:
    assert [images[row] for row in shown_rows(images, "normal")] == images
    if len(set(images)) > 1:
        shown = [images[row] for row in shown_rows(images, "shuffled")]
        assert all(other != image for other, image in zip(shown, images, strict=True))
        assert len(set(zip(images, shown, strict=True))) == len(set(images)) == len(set(shown))
    else:
        with pytest.raises(ValueError, match="at least two different images"):
            shown_rows(images, "shuffled")
