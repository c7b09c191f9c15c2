"""Pushing a run: what arrives on a stub of the Hub, what never does, what its card says, and what failures cost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from biod2c.dataset_builder.schema import FEATURES
from biod2c.hub_retries import with_retries
from biod2c.train_hf import main, train
from biod2c.training.hub import open_repository, push_run, pushed_files, rows_fingerprint
from biod2c.training.recipe import load_recipe

CANARY = "hf_CanaryCanaryCanaryCanary0123456789"  # the stub's token

# In another process, by the Hub's names alone: the logits of each are those of its folder
CHILD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
for name, wanted in zip(sys.argv[2::2], sys.argv[3::2]):
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
    inputs = AutoProcessor.from_pretrained(name, trust_remote_code=True)(images=sys.argv[1], text="Is it there?")
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, load_file(wanted)["logits"])
    answer = model.generate(**inputs, max_new_tokens=3)
    print(name, same, answer.shape[1] > inputs["input_ids"].shape[1], "biod2c" in sys.modules)
"""


PUSH = ["--push_to_hub", "true", "--hub_model_id", "org/tiny"]


def pushed_texts(hub, repo="org/tiny"):
    return {name: content.decode() for name, content in hub.files(repo).items() if name.endswith((".md", ".yaml"))}


def save_logits(folder, image, path):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=image, text="Is it there?")
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits}, path)


@pytest.mark.slow
def test_a_pushed_run_loads_by_its_name_elsewhere(hub, make_recipe, make_image, tmp_path):
    """A full model, then adapters to it: its folder's name becomes the Hub's name of what it was pushed as."""
    first = train(make_recipe("a.yaml", output_dir=str(tmp_path / "a")), ["--push_to_hub", "true"])
    changes = {"model": str(first), "vocab_size": None, "config": {}, "train": ["fusion", "lora"], "lora": {"r": 4}}
    second = train(make_recipe("b.yaml", output_dir=str(tmp_path / "b"), learning_rate=1e-2, **changes), PUSH)
    assert json.loads(hub.files("org/tiny")["adapter_config.json"])["base_model_name_or_path"] == "org/a"
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    assert not [name for name in hub.files("org/tiny") if name.startswith("model")]
    metadata = ModelCard(pushed_texts(hub)["README.md"]).data.to_dict()
    assert metadata["base_model"] == ["org/a"] and "lora" in metadata["tags"] and metadata["license"] == "apache-2.0"

    image = tmp_path / "scan.png"
    make_image().save(image)
    wanted = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for folder, path in zip((first, second), wanted, strict=True):
        save_logits(folder, str(image), path)
    for folder in (first, second):
        folder.rename(folder.with_name(f"moved-{folder.name}"))  # nothing may come from there
    (tmp_path / "empty").mkdir()
    keep = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, image, "org/a", wanted[0], "org/tiny", wanted[1]],
        cwd=tmp_path / "empty",
        env={**keep, **hub.environment(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.splitlines() == ["org/a True True False", "org/tiny True True False"], result.stderr[-3000:]


def test_only_what_is_for_the_hub_leaves(hub, make_recipe, make_rows, tmp_path, capfd):
    rows = make_rows(6, 4)
    for row in rows[:4]:
        row["image"] = {"bytes": b"not an image", "path": None}
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "damaged" / "train.parquet")
    saving = {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard", "bad_sample_limit": 0.5}
    recipe = make_recipe(dataset=str(tmp_path / "damaged"), max_steps=3, **saving)
    run = tmp_path / "run"
    (run / "unfinished" / "checkpoint-1").mkdir(parents=True)
    (run / "unfinished" / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    main([str(recipe), *PUSH])
    assert (run / "bad_samples.jsonl").is_file() and (run / "checkpoint-2" / "optimizer.pt").is_file()
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    code = {f"{name}_biod2c.py" for name in ("configuration", "modeling", "image_processing", "processing")}
    processor = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    rest = {"recipe.yaml", "README.md", "losses.png"}
    assert set(hub.files("org/tiny")) == weights | code | processor | rest
    assert hub.requests("/commit/") == 1

    printed = "".join(capfd.readouterr())
    assert "pushed http" in printed and CANARY not in printed
    everything = [*hub.files("org/tiny").values(), *(path.read_bytes() for path in run.rglob("*") if path.is_file())]
    assert not [content for content in everything if CANARY.encode() in content]


def test_the_card(hub, make_recipe, dataset_folder):
    evaluating = {"eval_split": "validation", "eval_strategy": "steps", "eval_steps": 1, "eval_questions": 4}
    output = train(make_recipe(**evaluating), PUSH)
    card = ModelCard.load(output / "README.md")
    assert hub.files("org/tiny")["README.md"] == (output / "README.md").read_bytes()
    wanted = {"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    assert wanted.items() <= card.data.to_dict().items()
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()  # no local paths there
    assert 'from_pretrained("org/tiny", trust_remote_code=True)' in card.text
    assert "Not a medical device" in card.text
    last = [e for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "eval_loss" in e][-1]
    assert f"| loss | {last['eval_loss']:.4g} |" in card.text and "| accuracy |" in card.text
    assert "after 2 of 2 steps" in card.text and "runtime" not in card.text.split("## Data")[0]
    for split, count in (("train", 24), ("validation", 8)):
        rows = Dataset.from_parquet(str(dataset_folder / f"{split}.parquet"))
        assert f"| {split} | {count} | `{rows_fingerprint(rows)}` |" in card.text
    recipe = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((output / "recipe.yaml").read_text())
    assert f"- torch {torch.__version__}" in card.text


def test_the_fingerprint_follows_the_rows(make_rows):
    rows = Dataset.from_list(make_rows(2, 2))
    changed = Dataset.from_list([{**row, "answer": "No"} for row in make_rows(2, 2)])
    assert rows_fingerprint(rows) != rows_fingerprint(changed)
    assert rows_fingerprint(rows) != rows_fingerprint(rows.select([1, 0, 2, 3]))


@pytest.mark.slow
def test_the_revision_of_a_data_set_on_the_hub(hub, dataset_folder, tmp_path):
    files = {name: (dataset_folder / name).read_bytes() for name in ("train.parquet", "validation.parquet")}
    revision = hub.create("org/data", "datasets").add(
        {name: {"data": content, "oid": name} for name, content in files.items()}
    )
    code = """
import datasets
from biod2c.training.hub import _revision
print(_revision(datasets.load_dataset("org/data", split="train").select([0, 1]), "org/data"))
"""
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == revision, result.stderr[-2000:]


def test_a_card_without_a_push(make_recipe, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    output = train(make_recipe(), [])
    assert f'from_pretrained("{output}"' in (output / "README.md").read_text()
    assert not (output / "hub.json").exists()


@pytest.fixture
def finished(tiny_checkpoint, tmp_path):
    """A run's folder, without the training."""
    run = shutil.copytree(tiny_checkpoint, tmp_path / "finished")
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    return run


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_pass_are_waited_out(hub, make_recipe, finished, status):
    places = ("/api/repos/create", "/api/validate-yaml", "/preupload/", "/objects/batch", "/_lfs/", "/commit/")
    for place in places:
        hub.fail(place, status, times=2)
    recipe, arguments, _ = load_recipe(make_recipe(), PUSH)
    assert open_repository(recipe, arguments) == "org/tiny"
    push_run(finished, "org/tiny")
    assert hub.files("org/tiny") == {path.name: path.read_bytes() for path in pushed_files(finished)}
    assert {failure[2] for failure in hub.failures} == {0}
    assert len(hub.repos["models/org/tiny"].commits) == 2  # the empty first and ours


@pytest.mark.parametrize(
    ("place", "status", "tries"),
    [("/commit/", 403, 1), ("/commit/", 503, 6), ("/_lfs/", 403, 1), ("/api/validate-yaml", 502, 6)],
)
def test_failures_that_stay_are_one_clear_error(hub, finished, place, status, tries):
    hub.create("org/tiny")
    hub.fail(place, status)
    with pytest.raises(
        ValueError, match=r"push to org/tiny failed: .*\. The run is whole in .*; push it with"
    ) as caught:
        push_run(finished, "org/tiny")
    assert str(status) in str(caught.value) or place == "/api/validate-yaml"  # there its page is all that is known
    assert hub.requests(place) == tries
    assert hub.files("org/tiny") == {}


def test_waits_grow_and_follow_the_hub(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    request = httpx2.Request("POST", "http://hub")
    asked = [
        httpx2.Response(503, request=request),
        httpx2.Response(429, headers={"Retry-After": "30"}, request=request),
    ]
    errors = [HfHubHTTPError("no", response=response) for response in asked] + [httpx2.ConnectError("down")]

    def call():
        if errors:
            raise errors.pop(0)
        return "done"

    assert with_retries(call) == "done"
    assert waited == [1, 30, 4]


def test_a_push_that_fails_leaves_the_run_on_disk(hub, make_recipe, capfd):
    hub.fail("/commit/", 403)
    recipe = make_recipe(max_steps=1)
    with pytest.raises(ValueError, match="push to org/tiny failed: 403, told to fail") as caught:
        train(recipe, PUSH)
    assert CANARY not in "".join([*capfd.readouterr(), str(caught.value)])
    run = Path(load_recipe(recipe, [])[1].output_dir)
    assert {"model.safetensors", "README.md", "recipe.yaml"} <= {path.name for path in pushed_files(run)}
    assert not (run / "hub.json").exists()
    hub.failures.clear()
    push_run(run, "org/tiny")  # what the error's command does
    assert hub.files("org/tiny")["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_a_repo_that_may_not_be_made_ends_the_run_before_it_trains(hub, make_recipe):
    hub.fail("/api/repos/create", 403)
    recipe = make_recipe()
    with pytest.raises(ValueError, match="org/tiny cannot be made, nothing was trained: 403"):
        train(recipe, PUSH)
    assert not Path(load_recipe(recipe, [])[1].output_dir, "recipe.yaml").exists()


def test_without_a_token_nothing_starts(hub, make_recipe, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="set HF_TOKEN or run `hf auth login`"):
        train(make_recipe(), PUSH)
    assert hub.log == []


def test_adapters_to_a_base_that_only_this_machine_has(hub, make_recipe, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    recipe = make_recipe(model=str(base), vocab_size=None, config={}, train=["lora"])
    with pytest.raises(ValueError, match=r"Push that run first .* or train without pushing and `biod2c merge`"):
        train(recipe, PUSH)


def test_a_second_push_leaves_no_file_of_the_first(hub, finished):
    hub.create("org/tiny")
    push_run(finished, "org/tiny")
    (finished / "model.safetensors").rename(finished / "model-00001-of-00001.safetensors")
    push_run(finished, "org/tiny")
    weights = [name for name in hub.files("org/tiny") if name.endswith(".safetensors")]
    assert weights == ["model-00001-of-00001.safetensors"]
    push_run(finished, "org/tiny")  # nothing new: no commit
    assert len(hub.repos["models/org/tiny"].commits) == 3


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"hub_token": CANARY}, []),
        ({"hub_token": "another"}, []),
        ({"dataset": f"https://user:{CANARY}@huggingface.co/d"}, []),
        ({}, ["--hub_token", CANARY]),
        ({}, [f"--config.hub_token={CANARY}"]),
    ],
)
def test_a_token_in_a_recipe_is_refused(make_recipe, changes, overrides):
    with pytest.raises(ValueError, match="set HF_TOKEN instead") as caught:
        load_recipe(make_recipe(**changes), overrides)
    assert CANARY not in str(caught.value)


def test_a_broken_recipe_does_not_print_its_token(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(f"hub_token: {CANARY}: x")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_recipe(path, [])
    assert CANARY not in str(caught.value)


def test_what_does_not_apply_is_refused(make_recipe):
    with pytest.raises(ValueError, match="hub_strategy does not apply"):
        load_recipe(make_recipe(hub_strategy="every_save"), [])
