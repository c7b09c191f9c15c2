"""A saved checkpoint opens where this repository has never been: another process, another folder, its own code."""

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from biod2c import BioD2CForConditionalGeneration, BioD2CProcessor

ROOT = Path(__file__).parents[1]
HUB_FILES = ("configuration_biod2c", "modeling_biod2c", "image_processing_biod2c", "processing_biod2c")
QUESTIONS = ["Where is the liver?", "Is it left?"]
GREEDY = {"do_sample": False, "max_new_tokens": 5}

# Runs where only torch, transformers, safetensors and Pillow are to be relied on; prints what it found as JSON
CHILD = """
import json, sys
from pathlib import Path

# the editable install of this environment must not be where the code comes from
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path[:] = [entry for entry in sys.path if "editable" not in entry]
try:
    import biod2c
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("biod2c can be imported here: this proves nothing")

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoProcessor, AutoTokenizer, pipeline)

checkpoint, image, wanted, target = sys.argv[1:5]
wanted, questions, greedy = load_file(wanted), json.loads(sys.argv[5]), json.loads(sys.argv[6])
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(checkpoint, **trust)
image_processor = AutoImageProcessor.from_pretrained(checkpoint, **trust)
tokenizer = AutoTokenizer.from_pretrained(checkpoint, **trust)
config = AutoConfig.from_pretrained(checkpoint, **trust)
picture = Image.open(image)
inputs = processor(images=[picture, picture], text=questions, queue=[["left", "the liver"], ["right"]])
report = {
    "modules": {type(x).__name__: type(x).__module__ for x in (processor, image_processor, config)},
    "pixels": torch.equal(image_processor(picture, return_tensors="pt")["pixel_values"], wanted["pixel_values"][:1]),
    "image_token": tokenizer.convert_tokens_to_ids("<image>"),
    "inputs": all(torch.equal(inputs[name], wanted[name]) for name in inputs),
    "logits": {}, "loss": {}, "answers": {},
}
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained(checkpoint, **trust)
    report["modules"][auto.__name__] = type(model).__module__
    assert type(model).__name__ == "BioD2CForConditionalGeneration" and not model.training
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
    report["logits"][auto.__name__] = torch.equal(output.logits, wanted["logits"])
    report["loss"][auto.__name__] = torch.equal(output.loss, wanted["loss"])
    report["answers"][auto.__name__] = torch.equal(model.generate(**inputs, **greedy), wanted["answers"])
model.save_pretrained(target)
processor.save_pretrained(target)

ask = pipeline("image-text-to-text", model=checkpoint, **trust)
chats = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
         for question in questions]
settings = {"return_full_text": False, "generate_kwargs": greedy}
report["pipeline"] = [ask(text=chat, **settings)[0]["generated_text"] for chat in chats]
report["pipeline in a batch"] = [answer[0]["generated_text"] for answer in ask(text=chats, batch_size=2, **settings)]
report["biod2c"] = [name for name in sys.modules if name.split(".")[0] == "biod2c"]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, tiny_checkpoint, make_image):
    """The checkpoint copied to a folder with an awkward name, an image, and what the package itself makes of both."""
    root = tmp_path_factory.mktemp("elsewhere")
    checkpoint = root / "my model, v1.0"
    shutil.copytree(tiny_checkpoint, checkpoint)
    make_image().save(root / "scan.png")
    processor = BioD2CProcessor.from_pretrained(tiny_checkpoint)
    model = BioD2CForConditionalGeneration.from_pretrained(tiny_checkpoint)
    queue = [["left", "the liver"], ["right"]]
    inputs = processor(images=[make_image(), make_image()], text=QUESTIONS, queue=queue)
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])
    answers = model.generate(**inputs, **GREEDY)
    wanted = {**inputs, "logits": output.logits, "loss": output.loss, "answers": answers}
    save_file(wanted, root / "wanted.safetensors")
    texts = processor.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return root, texts, processor.image_token_id


def run_child(python: Path, root: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """A process of its own: no PYTHONPATH, no cwd on the path, a fresh HF_HOME, no network, nobody at the keyboard."""
    (root / "empty").mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(root / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums in another order differ in the last bit
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [python, "-I", "-c", code, *arguments],
        cwd=root / "empty",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_child(python: Path, elsewhere: tuple) -> None:
    root, texts, image_token = elsewhere
    target = root / f"saved by {python.parent.parent.name}"
    paths = [root / "my model, v1.0", root / "scan.png", root / "wanted.safetensors", target]
    result = run_child(python, root, CHILD, *map(str, paths), json.dumps(QUESTIONS), json.dumps(GREEDY))
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    classes = {"BioD2CProcessor", "BioD2CImageProcessor", "BioD2CConfig"}
    autos = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"}
    assert set(report["modules"]) == classes | autos
    assert all(module.startswith("transformers_modules.") for module in report["modules"].values()), report["modules"]
    assert report["biod2c"] == []
    assert report["inputs"]
    assert report["pixels"]
    assert report["image_token"] == image_token
    for name in ("logits", "loss", "answers"):
        assert report[name] == dict.fromkeys(autos, True), name
    assert report["pipeline"] == report["pipeline in a batch"] == texts
    one, two = ({f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} for folder in (paths[0], target))
    assert one == two  # what was loaded through remote code saves as it was


def test_opens_in_another_process(elsewhere):
    check_child(Path(sys.executable), elsewhere)


@pytest.fixture
def bare_python(tmp_path):
    """An environment with only torch, transformers, safetensors and Pillow; a gigabyte, so it does not stay."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    packages = ("torch", "transformers", "safetensors", "Pillow")
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *packages]
    subprocess.run(pip, check=True, timeout=900)
    yield python
    shutil.rmtree(tmp_path / "bare")


@pytest.mark.slow
def test_opens_in_a_bare_environment(elsewhere, bare_python):
    listed = subprocess.run([bare_python, "-m", "pip", "list"], capture_output=True, text=True, check=True)
    for absent in ("biod2c", "accelerate", "peft", "datasets", "torchvision", "matplotlib"):
        assert f"\n{absent} " not in listed.stdout.lower()
    check_child(bare_python, elsewhere)


def test_code_of_a_checkpoint_does_not_run_unasked(elsewhere):
    """Without trust_remote_code and without a keyboard: an error, and nothing of the folder is imported."""
    root, *_ = elsewhere
    code = """
import sys
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1])
except ValueError as error:
    print("\\n", "trust_remote_code" in str(error), any("modeling_biod2c" in name for name in sys.modules))
"""
    result = run_child(Path(sys.executable), root, code, str(root / "my model, v1.0"))
    assert result.stdout.splitlines()[-1].strip() == "True False", result.stderr[-2000:]


# ------------------------------------------------------------------------------------- what the code may import and do


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def imports(module: ast.Module) -> set[tuple[int, str]]:
    """(level, module) of every import, wherever it stands."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
    return found


# of the standard library: what starts programs, opens connections, runs or unpickles code
NOT_FOR_A_MODEL = {"builtins", "ctypes", "ftplib", "http", "importlib", "marshal", "multiprocessing", "pickle", "runpy"}
NOT_FOR_A_MODEL |= {"shelve", "shutil", "smtplib", "socket", "ssl", "subprocess", "tempfile", "urllib", "webbrowser"}


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_import_only_what_they_may(name):
    allowed = {"torch", "transformers", "numpy", "PIL"} | (set(sys.stdlib_module_names) - NOT_FOR_A_MODEL)
    for level, module in imports(tree(name)):
        if level:
            assert (level, module in HUB_FILES) == (1, True), f"from {'.' * level}{module}"
        else:
            assert module.split(".")[0] in allowed, module


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_run_no_other_code(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "compile", "__import__", "globals", "open", "input"}, node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            assert node.value.id != "os" or node.attr in {"path", "PathLike"}, used
            assert used not in {"torch.load", "torch.save", "torch.hub", "np.load", "numpy.load"}, used


def repository() -> list[Path]:
    folders = ("dataset_builder", "evaluation", "training", "benchmarks")
    nested = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [*ROOT.glob("*.py"), *nested]


def test_nothing_is_unpickled_or_pickled():
    """`torch.load` only with weights_only=True; weights are written as safetensors alone."""
    loads = 0
    for file in repository():
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
            ):
                call = f"{node.func.value.id}.{node.func.attr}"
                assert call not in {"torch.save", "pickle.load", "pickle.loads", "pickle.dump", "joblib.load"}, (
                    file,
                    call,
                )
                if call == "torch.load":
                    loads += 1
                    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                    assert isinstance(keywords["weights_only"], ast.Constant), file
                    assert keywords["weights_only"].value is True, file
    assert loads == 1  # PMC-CLIP's pickle


def test_a_checkpoint_carries_the_hub_files_as_they_are(tiny_checkpoint):
    for name in HUB_FILES:
        assert (tiny_checkpoint / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    assert {file.stem for file in tiny_checkpoint.glob("*.py")} == set(HUB_FILES)
