"""The model a recipe starts from, which of its parts learn, and in which precision each is held.

Unusual here: a language model that is frozen under mixed precision is held in 16 bits (or 4), all else in 32. A 7B
model then takes 13.5 GB instead of 27, and what learns loses no small update to rounding.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainingArguments

from ..configuration_biod2c import BioD2CConfig
from ..image_processing_biod2c import BioD2CImageProcessor
from ..modeling_biod2c import BioD2CForConditionalGeneration
from ..processing_biod2c import BioD2CProcessor
from .launch import mixed_precision
from .recipe import Recipe

# Where a part's parameters are, for a model without adapters
MODULES = {"vision": "vision_model", "fusion": "fusion", "language_model": "language_model"}


def build_model(
    recipe: Recipe, rows: Dataset, arguments: TrainingArguments
) -> tuple[BioD2CForConditionalGeneration, BioD2CProcessor]:
    """The starting model and its processor: a checkpoint, two components, or all new.

    Raises:
        ValueError: for a configuration that cannot be built, or a checkpoint whose weights do not fit it.
    """
    dtype = frozen_dtype(recipe, arguments)
    if recipe.model:
        with _float32_but_language_model():
            model = BioD2CForConditionalGeneration.from_pretrained(
                recipe.model, dtype=dtype, quantization_config=_quantization(recipe, dtype), **recipe.config
            )
        return model, BioD2CProcessor.from_pretrained(recipe.model)
    if recipe.vocab_size:
        tokenizer = train_tokenizer(_texts(rows), recipe.vocab_size)
        return _new_model(recipe, tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.language_model)
    visual_tokens = recipe.config.get("num_visual_tokens", BioD2CConfig.num_visual_tokens)
    processor = BioD2CProcessor(BioD2CImageProcessor(), tokenizer, num_visual_tokens=visual_tokens)
    fields = {"image_token_id": processor.image_token_id, **recipe.config}
    model = BioD2CForConditionalGeneration.from_components(recipe.vision, recipe.language_model, dtype, **fields)
    processor.image_processor = _image_processor(model.config)
    return model, processor


def frozen_dtype(recipe: Recipe, arguments: TrainingArguments) -> torch.dtype:
    """What the language model is held in: 16 bits under mixed precision, unless it trains whole."""
    return torch.float32 if "language_model" in recipe.train else mixed_precision(arguments) or torch.float32


@contextmanager
def _float32_but_language_model() -> Iterator[None]:
    """Within, `from_pretrained` gives its `dtype` to the frozen language model alone (its own option, a class's)."""
    BioD2CForConditionalGeneration._keep_in_fp32_modules_strict = [MODULES["vision"], MODULES["fusion"]]
    try:
        yield
    finally:
        BioD2CForConditionalGeneration._keep_in_fp32_modules_strict = None


def _quantization(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """QLoRA's: the language model's linear layers in NF4, computed with in `dtype`."""
    if not recipe.quantization:
        return None
    defaults = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": ["vision_model", "fusion", "lm_head"],
    }
    return BitsAndBytesConfig(**{**defaults, **recipe.quantization})


def _new_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[BioD2CForConditionalGeneration, BioD2CProcessor]:
    fields = dict(recipe.config)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields["text_config"] = {**fields.get("text_config", {}), "vocab_size": len(tokenizer) + 1, **ids}
    config = BioD2CConfig(**fields)
    processor = BioD2CProcessor(_image_processor(config), tokenizer, num_visual_tokens=config.num_visual_tokens)
    config.image_token_id = processor.image_token_id
    return BioD2CForConditionalGeneration(config), processor


def _image_processor(config: BioD2CConfig) -> BioD2CImageProcessor:
    side = config.vision_config.image_size
    return BioD2CImageProcessor(size={"height": side, "width": side})


def _texts(rows: Dataset) -> Iterable[str]:
    for column in ("question", "answer"):
        yield from rows[column]
    for queue in rows["queue"]:
        yield from queue or []


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <pad>, <s>, </s>; nothing is ever out of its vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # a space before each, as in the prompt, where every text follows a colon or another text
    backend.train_from_iterator((f" {text}" for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def select_parts(
    model: BioD2CForConditionalGeneration, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> BioD2CForConditionalGeneration | PeftModel:
    """Freeze all but the recipe's parts; with lora, wrap in PEFT, which saves the other parts whole beside the
    adapters. What learns is float32, and a frozen language model `dtype`."""
    whole = [MODULES[part] for part in recipe.train if part in MODULES]
    if "embeddings" in recipe.train:
        whole += _embedding_names(model)
    if not recipe.quantization:
        model.language_model.to(dtype)
    if "lora" in recipe.train:
        fields = {"target_modules": r"language_model\..*(q_proj|v_proj)", **recipe.lora}
        model = get_peft_model(model, LoraConfig(modules_to_save=whole or None, **fields))
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # PEFT trains a copy and keeps this for `disable_adapter`, which no run calls: 1.6 GB at full size
                module.original_module = torch.nn.Identity()
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(name.startswith(f"{module}.") or f".{module}." in name for module in whole)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _embedding_names(model: BioD2CForConditionalGeneration) -> list[str]:
    embeddings = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return [name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in embeddings]


def parts_table(model: torch.nn.Module) -> str:
    """What trains: for each part its parameters, how many learn, their dtypes and the weights' memory."""
    parts: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = (
            "lora" if ".lora_" in name else next((p for p, module in MODULES.items() if f"{module}." in name), "other")
        )
        row = parts.setdefault(part, {"all": 0, "trainable": 0, "bytes": 0, "dtypes": set()})
        row["all"] += parameter.numel()
        row["trainable"] += parameter.numel() * parameter.requires_grad
        row["bytes"] += parameter.numel() * parameter.element_size()
        row["dtypes"].add(str(parameter.dtype).removeprefix("torch."))
    lines = [f"{'part':<16}{'parameters':>14}{'trainable':>14}{'MiB':>9}  dtype"]
    for part, row in parts.items():
        dtypes = ", ".join(sorted(row["dtypes"]))
        lines.append(f"{part:<16}{row['all']:>14,}{row['trainable']:>14,}{row['bytes'] / 2**20:>9.1f}  {dtypes}")
    return "\n".join(lines)
