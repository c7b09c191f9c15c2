"""What all tests share: no network, a cache of their own, skips that say why, and the fixtures of several files.

Unusual here: the environment is set when this file is imported, before any test imports transformers or datasets, which
read it once. Each pytest process has its own HF_HOME: parallel processes would otherwise write the same copies of a
checkpoint's remote code.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

_HF_HOME = tempfile.TemporaryDirectory(prefix="biod2c-tests-")  # removed when the process ends
os.environ["HF_HOME"] = _HF_HOME.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, with the reason."""
    if item.get_closest_marker("gpu") and not _has_cuda():
        pytest.skip("needs a CUDA device: none here")
    if item.get_closest_marker("internet") and os.environ["HF_HUB_OFFLINE"] != "0":
        pytest.skip("needs the public network: set HF_HUB_OFFLINE=0 to run it")
    if item.get_closest_marker("api_key") and not os.environ.get("OPENAI_API_KEY"):
        pytest.skip("needs an API key: set OPENAI_API_KEY to run it")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# Fixtures that several test files use (tiny models, processors, images) go below this line.


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level BPE tokenizer trained on the spot; ids below 300 only."""

    def make(bos_token: str | None = "<s>"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=299,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(["Question: Where is the liver? Answer: the liver is on the left"] * 2, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos_token, eos_token="</s>", pad_token="<pad>"
        )

    return make


@pytest.fixture(scope="session")
def processor(make_tokenizer):
    """64-pixel images, eight visual and question tokens."""
    from biod2c import BioD2CImageProcessor, BioD2CProcessor

    image_processor = BioD2CImageProcessor(size={"height": 64, "width": 64})
    return BioD2CProcessor(image_processor, make_tokenizer(), num_visual_tokens=8)


@pytest.fixture(scope="session")
def make_config(processor):
    """BioD2C with every box of Fig. 2, each as small as it can be: 4 x 4 grid cells, 3 scales, 2 layers."""

    def make(**fields):
        from transformers import LlamaConfig

        from biod2c import BioD2CConfig, BioD2CVisionConfig

        text_config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        tiny = {
            "vision_config": BioD2CVisionConfig(layers=(1, 1, 1, 1), width=8, image_size=64),
            "text_config": text_config,
            "image_token_id": processor.image_token_id,
            "num_visual_tokens": 8,
            "num_question_tokens": 8,
            "num_scales": 3,
            "text_mlp_dim": 32,
            "fusion_layers": 2,
            "fusion_heads": 4,
            "fusion_ffn_dim": 32,
        }
        return BioD2CConfig(**{**tiny, **fields})

    return make


@pytest.fixture
def make_model(make_config):
    """A tiny random model in eval mode, the same at each call with the same fields."""

    def make(**fields):
        import torch

        from biod2c import BioD2CForConditionalGeneration

        torch.manual_seed(0)
        return BioD2CForConditionalGeneration(make_config(**fields)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, make_config, processor):
    """Folder of a saved tiny model with its processor and code files, as a Hub repo would hold it."""
    import torch

    from biod2c import BioD2CForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    torch.manual_seed(0)
    BioD2CForConditionalGeneration(make_config()).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_image():
    """A deterministic RGB image with a bright square, so that where the model looks can be checked."""

    def make(seed: int = 0, size: tuple[int, int] = (80, 60), mode: str = "RGB"):
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
        pixels[10:30, 40:60] = 250
        return Image.fromarray(pixels).convert(mode)

    return make


@pytest.fixture
def hub(monkeypatch):
    """A stub of the Hugging Face Hub, for this process too, with a canary as token; nobody waits between tries."""
    import huggingface_hub

    # tests/ is no package: its files cannot import each other by name
    spec = importlib.util.spec_from_file_location("hub_stub", Path(__file__).with_name("hub_stub.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.HubStub("hf_CanaryCanaryCanaryCanary0123456789") as stub:
        for name, value in stub.environment(Path(os.environ["HF_HOME"])).items():
            monkeypatch.setenv(name, value)
        constants = huggingface_hub.constants  # read from the environment at import
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        huggingface_hub.close_session()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield stub
    huggingface_hub.close_session()
