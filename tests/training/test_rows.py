"""The rows that a recipe names: several datasets, plain ones, weights, streams; and what each mistake is told."""

import json
from collections import Counter

import pytest
from datasets import Dataset, Features, IterableDataset, Value

from biod2c.dataset_builder.schema import FEATURES
from biod2c.train_hf import train
from biod2c.training.data import BadSampleLimit
from biod2c.training.recipe import load_recipe
from biod2c.training.rows import RowStream, load_rows, weigh

PLAIN = ("image", "question", "answer")


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """datasets waits five seconds whenever it has come to the end of several Parquet readers."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def plain_folder(tmp_path, make_rows):
    """A hospital's dataset: three columns, one more that the schema does not know, and answers that are numbers."""
    rows = [{name: row[name] for name in PLAIN} | {"ward": 3, "answer": 7} for row in make_rows(3, 2, first=20)]
    types = {"image": FEATURES["image"], "question": Value("string"), "answer": Value("int64"), "ward": Value("int32")}
    Dataset.from_list(rows, features=Features(types)).to_parquet(tmp_path / "hospital" / "train.parquet")
    return tmp_path / "hospital"


@pytest.fixture
def make_streaming(make_recipe, tiny_checkpoint):
    """A recipe that starts from a checkpoint, as a stream's must, with every step's loss logged; constant rate."""

    def make(**changes):
        start = {"model": str(tiny_checkpoint), "vocab_size": None, "config": {}, "lr_scheduler_type": "constant"}
        return make_recipe(**{**start, "max_steps": 7, "per_device_train_batch_size": 4, **changes})

    return make


def rows_of(recipe_path, split="train", seed=0):
    return load_rows(load_recipe(recipe_path, [])[0], split, seed)


def losses(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"], entry["epoch"]) for entry in history if "loss" in entry]


def test_several_datasets_with_weights_and_held_out_rows_of_one(make_recipe, dataset_folder, plain_folder):
    datasets = [{"path": str(dataset_folder)}, {"path": str(plain_folder), "weight": 2.5, "eval_split": None}]
    recipe = make_recipe(dataset=datasets, eval_split="validation")
    rows = rows_of(recipe)
    assert rows.features == FEATURES.copy() | {"image": rows.features["image"]}
    times = Counter(row["id"] for row in rows if row["source"] == "hospital")
    assert sorted(times.values()) == [2, 2, 2, 3, 3, 3]
    assert len(rows) == 24 + 15
    assert len(rows_of(recipe, "eval", None)) == 8
    output = train(recipe, ["--eval_strategy", "steps"])
    assert len(losses(output)) == 2
    card = (output / "README.md").read_text()
    for line in (
        f"- `{dataset_folder}`, configuration `default`\n",
        f"- `{plain_folder}`, configuration `default`, weight",
    ):
        assert line in card


def test_a_plain_dataset_trains(make_recipe, plain_folder):
    recipe = make_recipe(dataset=str(plain_folder), rows_per_image=2)
    rows = rows_of(recipe)
    assert set(rows["answer"]) == {"7"} and list(rows["queue"]) == [[]] * 6 and set(rows["source"]) == {"hospital"}
    assert len(set(rows["id"])) == 6
    assert set(Counter(rows["image_sha256"]).values()) == {2}
    output = train(recipe, [])
    assert "| train | 6 |" in (output / "README.md").read_text()


def test_a_missing_column_and_a_missing_dataset_are_named(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list([{"image": "a.png", "query": "Is it?"}]).to_parquet(tmp_path / "odd" / "train.parquet")
    with pytest.raises(ValueError, match=r"odd has no column question, answer; it has image, query\. Rename"):
        rows_of(make_recipe(dataset=str(tmp_path / "odd")))
    with pytest.raises(
        ValueError, match=rf"out/demo/biovgq: no folder {tmp_path}/out/demo/biovgq .* `biod2c build all"
    ):
        rows_of(make_recipe(dataset="out/demo/biovgq"))
    with pytest.raises(ValueError, match=r"some/name: no folder .* on the Hub .* a dataset of the Hub"):
        rows_of(make_recipe(dataset="some/name"))
    with pytest.raises(ValueError, match=r'odd: Unknown split "dev"'):
        rows_of(make_recipe(dataset=str(tmp_path / "odd"), train_split="dev"))


def test_weights_are_how_often_a_row_stands():
    sources = ["slake"] * 10 + ["vqa_rad"] * 4
    rows = weigh(sources, {"vqa_rad": 0.5, "slake": 2}, seed=0)
    assert Counter(rows[:20]) == dict.fromkeys(range(10), 2)
    assert len(set(rows[20:])) == 2 and set(rows[20:]) <= set(range(10, 14))
    assert rows == weigh(sources, {"vqa_rad": 0.5, "slake": 2}, seed=0)
    with pytest.raises(ValueError, match="no row of pmc_vqa; there are slake, vqa_rad"):
        weigh(sources, {"pmc_vqa": 1}, seed=0)
    with pytest.raises(ValueError, match="slake has weight 0, must be above 0"):
        weigh(sources, {"slake": 0}, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "max_steps is missing"),
        ({"rows_per_image": 2}, "rows_per_image needs all rows"),
        ({"sources": {"slake": 2}}, "weights need all rows"),
        ({"dataset": [{"path": "a", "weight": 2}]}, "weights need all rows"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length needs all rows"),
        ({"model": None, "vocab_size": 299}, "vocab_size trains a tokenizer on all texts"),
        ({"streaming": False, "shuffle_buffer": 8}, "shuffle_buffer is a stream's"),
    ],
)
def test_what_a_stream_cannot_do(make_streaming, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(make_streaming(**{"streaming": True, **changes}), [])


def test_a_stream_trains_as_the_same_rows_in_order_do(make_streaming, tmp_path):
    """Over an epoch's end: 7 steps of 4 rows, of 24. Held-out rows and questions too."""
    held_out = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 7, "eval_questions": 2}
    recipe = make_streaming(config={"fusion_dropout": 0}, train=["fusion"], **held_out)
    whole = train(recipe, ["--train_sampling_strategy", "sequential", "--output_dir", str(tmp_path / "whole")])
    stream = train(recipe, ["--streaming", "true", "--output_dir", str(tmp_path / "stream")])
    assert [entry[:2] for entry in losses(stream)] == [entry[:2] for entry in losses(whole)]
    assert len(losses(stream)) == 7
    evaluated = [json.loads((run / "trainer_state.json").read_text())["log_history"][7] for run in (whole, stream)]
    for name in ("eval_loss", "eval_accuracy"):
        assert evaluated[0][name] == evaluated[1][name]
    assert "| train | streamed, not counted |" in (stream / "README.md").read_text()


def test_a_worker_gives_out_the_same_batches(make_streaming, tmp_path):
    recipe = make_streaming(streaming=True, shuffle_buffer=8)
    alone = train(recipe, ["--output_dir", str(tmp_path / "alone")])
    workers = train(recipe, ["--dataloader_num_workers", "2", "--output_dir", str(tmp_path / "workers")])
    assert losses(workers) == losses(alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True, "gradient_accumulation_steps": 2},
        {"streaming": True, "shuffle_buffer": 8, "dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "rows_per_image": 2},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["stream", "shuffled, workers", "workers", "by length"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(make_streaming, tmp_path, monkeypatch, changes):
    """Interrupted in the second of its passes, dropout on; what was trained on is not decoded again."""
    recipe = make_streaming(max_steps=9, save_strategy="steps", save_steps=4, **changes)
    whole = train(recipe, ["--output_dir", str(tmp_path / "whole")])
    parts = ["--output_dir", str(tmp_path / "parts")]

    def interrupt(self, args, state, *_, **kwargs):
        if state.global_step == 8 + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BadSampleLimit, "on_step_end", interrupt)
        train(recipe, parts)
    assert losses(train(recipe, parts)) == losses(whole)
    assert losses(train(recipe, parts)) == losses(whole)  # it was at its end: nothing is added


def test_a_continued_stream_counts_what_it_had_without_giving_it_out(make_recipe):
    rows = rows_of(make_recipe())
    stream = rows.to_iterable_dataset()
    whole, rest = (list(RowStream(stream, 5, 12, done, shuffled=False)) for done in (0, 7))
    assert [row["id"] for row in whole] == (list(rows["id"]) * 3)[:60]
    assert rest == [None] * 35 + whole[35:]


def test_each_pass_of_a_shuffled_stream_has_an_order_of_its_own(make_recipe):
    rows = rows_of(make_recipe())
    stream = rows.to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=10)
    ids = [row["id"] for row in RowStream(stream, 24, 2, 0, shuffled=True)]
    first, second = ids[:24], ids[24:]
    assert first != second and sorted(first) == sorted(second) == sorted(rows["id"])
    assert ids == [row["id"] for row in RowStream(stream, 24, 2, 0, shuffled=True)]


def test_streams_of_several_datasets_alternate(make_streaming, dataset_folder, plain_folder):
    datasets = [{"path": str(dataset_folder)}, {"path": str(plain_folder)}]
    rows = rows_of(make_streaming(dataset=datasets, streaming=True))
    assert isinstance(rows, IterableDataset)
    sources = [row["source"] for row in rows]
    assert sources[1:12:2] == ["hospital"] * 6 and len(sources) == 30 and sources.count("hospital") == 6


def test_a_stream_without_rows(make_streaming):
    with pytest.raises(ValueError, match="the stream has no rows"):
        train(make_streaming(streaming=True, sources=["pmc_vqa"]), [])
