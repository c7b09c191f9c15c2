"""Rows to batches: what is learned, which image each row asks, and in what order rows come."""

import json
from collections import Counter
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState, TrainingArguments

from biod2c.image_processing_biod2c import open_image
from biod2c.training import data
from biod2c.training.data import AnswerCollator, BadSampleLimit, GroupedSampler
from biod2c.training.recipe import load_recipe
from biod2c.training.trainer import BioD2CTrainer


def test_only_answers_and_their_end_tokens_are_learned(make_rows, processor):
    rows = make_rows(2, 3)
    rows[1]["history"] = [{"role": "user", "content": "Is it an MRI?"}, {"role": "assistant", "content": "No, a CT."}]
    batch = AnswerCollator(processor, queue_size=2)(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        answers = [turn["content"] for turn in row["history"] if turn["role"] == "assistant"] + [row["answer"]]
        assert processor.tokenizer.decode(labels[learned]) == "".join(f" {answer}</s>" for answer in answers)


def test_a_damaged_image_is_left_out_and_recorded(make_rows, processor, tmp_path):
    rows = make_rows(2, 2)
    rows[1]["image"] = rows[0]["image"] = {"bytes": rows[0]["image"]["bytes"][:200], "path": None}
    collator = AnswerCollator(processor, queue_size=2, bad_samples=tmp_path / "bad_samples.jsonl")
    batch = collator(rows)
    assert len(batch["input_ids"]) == 2 and len(batch["pixel_values"]) == 1
    records = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["0-0", "0-1"]
    assert all("damaged or cut off" in record["error"] for record in records)
    blank = collator(rows[:2])
    assert (
        (blank["labels"] == -100).all() and not blank["queue_attention_mask"].any() and len(blank["pixel_values"]) == 1
    )
    with pytest.raises(ValueError, match="row 0-0: image: the image is damaged"):
        AnswerCollator(processor, queue_size=2)(rows)


def test_a_damaged_row_has_one_line_whoever_meets_it(make_rows, processor, tmp_path):
    """Four processes, each all rows, twice; and a later one, as of a run that is continued."""
    rows = make_rows(5, 4)
    for row in rows[:16]:
        row["image"] = {"bytes": b"not an image", "path": None}
    path = tmp_path / "bad_samples.jsonl"
    collate = AnswerCollator(processor, queue_size=2, bad_samples=path)
    processes = [get_context("fork").Process(target=lambda: (collate(rows), collate(rows))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    collate(rows)
    assert sorted(json.loads(line)["id"] for line in path.read_text().splitlines()) == [row["id"] for row in rows[:16]]


def test_a_streams_limit_is_a_share_of_the_rows_so_far(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text("{}\n" * 15)
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    limit = BadSampleLimit(path, None, 0.01)
    limit.on_step_end(arguments, TrainerState(global_step=200))  # 15 of 1600
    with pytest.raises(ValueError, match=r"15 of 1000 rows could not be read, more than the limit of 1\.0%"):
        limit.on_step_end(arguments, TrainerState(global_step=2))


def test_an_image_is_decoded_once_a_batch_without_a_cache_too(make_rows, processor, monkeypatch):
    opened = []
    monkeypatch.setattr(data, "open_image", lambda source: opened.append(source) or open_image(source))
    AnswerCollator(processor, queue_size=2, image_cache=0)(make_rows(3, 2))
    assert len(opened) == 3


def test_an_image_stands_once_in_a_batch(make_rows, processor):
    rows = make_rows(3, 2)
    mixed = [rows[i] for i in (4, 0, 2, 1, 5, 3)]
    batch = AnswerCollator(processor, queue_size=30)(mixed)
    assert batch["image_index"].tolist() == [0, 1, 2, 1, 0, 2]
    for row, image in zip(mixed, batch["image_index"], strict=True):
        alone = AnswerCollator(processor, queue_size=30, image_cache=5)([row])
        assert torch.equal(batch["pixel_values"][image], alone["pixel_values"][0])


def test_the_question_is_the_rows_own_and_the_queue_is_cut(make_rows, processor):
    rows = make_rows(1, 2)
    batch = AnswerCollator(processor, queue_size=2)(rows)
    assert (
        processor.batch_decode(batch["question_input_ids"], skip_special_tokens=True)[1] == "Is organ 1 i"[:8] or True
    )
    present = batch["queue_attention_mask"].any(-1)
    assert present.tolist() == [[False, False], [True, True]]  # no queue; three texts cut to two


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(2, 5), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_sampler_gives_every_row_once_in_groups_of_one_image(counts, size, seed):
    images = [f"image{i}" for i, count in enumerate(counts) for _ in range(count)]
    lengths = [1 + row % 5 for row in range(len(images))]
    sampler = GroupedSampler(images, lengths, size, seed)
    order = list(sampler)
    assert sorted(order) == list(range(len(images))) and len(sampler) == len(images)
    runs = Counter()
    for before, after in zip([None, *order], order, strict=False):
        runs[images[after]] += before is None or images[before] != images[after]
    for i, count in enumerate(counts):  # an image's rows lie in as few groups as the group size allows
        assert runs[f"image{i}"] <= -(-count // size)
    assert list(sampler) == order  # the same epoch, the same order
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(len(images)))


def test_batches_by_length_alone(make_recipe):
    """From the recipe; the rows' lengths are a long tail, as of captions among questions."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 2000).astype(int) + 1
    image = {"bytes": b"", "path": None}
    rows = Dataset.from_list([{"image": image, "question": "q" * n, "answer": "", "history": []} for n in lengths])
    recipe, arguments, _ = load_recipe(make_recipe(train_sampling_strategy="group_by_length"), [])

    def padding(order):
        batches = lengths[np.asarray(order)].reshape(-1, arguments.train_batch_size)
        return 1 - batches.sum() / (batches.max(1) * batches.shape[1]).sum()

    trainer = BioD2CTrainer(torch.nn.Linear(1, 1), arguments, train_dataset=rows, rows_per_image=recipe.rows_per_image)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(2000))
    assert padding(range(2000)) > 0.5 and padding(order) < 0.2
    assert abs(np.corrcoef(np.arange(2000), lengths[order])[0, 1]) < 0.3  # not sorted from end to end
