"""Weights of other systems in this model's format: the authors' BioD2C checkpoint, and PMC-CLIP's image encoder.

    biod2c convert biod2c model.safetensors FOLDER --tokenizer chaoyi-wu/PMC_LLAMA_7B
    biod2c convert pmc-clip checkpoint.pt FOLDER [--attention_pool]

Unusual here: the mapping runs from our names to theirs. An empty model on the meta device says which tensors there must
be and of what shape; each is looked up under the authors' name, so a missing or misshapen tensor is named before
anything is written, and whatever is left over must be known to be dead. Files are read and written tensor by tensor:
14 GB convert on a 24 GB machine.
"""

import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .cli import ArgumentParser
from .configuration_biod2c import BioD2CConfig, BioD2CVisionConfig
from .image_processing_biod2c import BioD2CImageProcessor
from .modeling_biod2c import BioD2CForConditionalGeneration, BioD2CVisionModel
from .processing_biod2c import AUTHORS_CHAT_TEMPLATE, BioD2CProcessor

LORA_ALPHA = 32  # the authors' constant; the rank is in the shapes
# What the authors' code holds but no forward pass of theirs that trains or answers ever uses, and a buffer that
# older versions of transformers saved
DEAD = re.compile(r"^(decoder_hpm|query_embed2|fc_hpm)\.|\.rotary_emb\.inv_freq$")
# Their trunk is an nn.Sequential of PMC-CLIP's modules (index 2, 5, 8 are ReLUs, 9 the average pool)
TRUNK_INDEX = {
    "conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7, "layer1": 10, "layer2": 11, "layer3": 12
}  # fmt: skip
FUSION_NAMES = [
    (r"^fusion\.gate\.beta$", "beta"),
    (r"^fusion\.query_embed$", "query_embed1.weight"),
    (r"^fusion\.text_encoder\.linear([12])\.", r"mlp.layer\1."),
    (r"^fusion\.proj\.linear([12])\.", r"fc_l\1."),
    (r"^fusion\.proj_gate\.linear([12])\.", r"fc_l\1_gate."),
    (r"^fusion\.decoder\.(layers\.\d+)\.cross_attn\.", r"decoder.\1.multihead_attn."),
    (r"^fusion\.decoder\.", "decoder."),
]
LANGUAGE_MODEL_PREFIXES = ("llamacasual.base_model.model.", "llamacasual.")


def convert_biod2c_state_dict(state_dict: Mapping[str, Tensor], merge_lora: bool = True) -> dict[str, Tensor]:
    """The authors' flat state dict -> `BioD2CForConditionalGeneration`'s.

    LoRA is merged in float32, W + (32 / r) B A, unless `merge_lora` is False (then the base weights are given).

    Raises:
        ValueError: naming the authors' key that is missing, of the wrong shape, or unknown.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    sources = _plan(shapes)
    return {ours: _build(theirs, state_dict.__getitem__, shapes, merge_lora) for ours, theirs in sources.items()}


def convert_pmc_clip_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PMC-CLIP's `visual.*` or `module.visual.*` tensors -> the whole image encoder of `BioD2CVisionModel`.

    Raises:
        ValueError: if there are none.
    """
    visual = {}
    for key, tensor in state_dict.items():
        if match := re.match(r"^(?:module\.)?visual\.(.+)$", key):
            visual[match[1]] = tensor
    if "layer3.0.conv1.weight" not in visual:
        raise ValueError(
            f'no PMC-CLIP image encoder: no key "visual.layer3.0.conv1.weight" among {len(state_dict)} keys'
        )
    return visual


def authors_config(shapes: Mapping[str, tuple[int, ...]]) -> BioD2CConfig:
    """The authors' constants, with the language model's sizes read from the shapes (heads of 128 wide, as in LLaMA).

    Raises:
        ValueError: if the shapes hold no language model.
    """
    prefix = _language_model_prefix(shapes)
    gate_key = f"{prefix}model.layers.0.mlp.gate_proj.weight"
    if gate_key not in shapes:
        raise ValueError(f"missing key {gate_key}")
    embedding, gate = shapes[f"{prefix}model.embed_tokens.weight"], shapes[gate_key]
    layers = {int(m[1]) for key in shapes if (m := re.match(rf"{re.escape(prefix)}model\.layers\.(\d+)\.", key))}
    text_config = LlamaConfig(
        vocab_size=embedding[0],
        hidden_size=embedding[1],
        intermediate_size=gate[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(embedding[1] // 128, 1),
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return BioD2CConfig(
        vision_config=BioD2CVisionConfig(),
        text_config=text_config,
        image_token_id=embedding[0],
        gate_init=0.1,
        semantic_queue_size=10,
        semantic_features="projected",
        semantic_divergence="t_v",
        mask_padding=False,
    )


def _language_model_prefix(shapes: Iterable[str]) -> str:
    for prefix in LANGUAGE_MODEL_PREFIXES:
        if f"{prefix}model.embed_tokens.weight" in shapes:
            return prefix
    expected = " or ".join(f"{prefix}model.embed_tokens.weight" for prefix in LANGUAGE_MODEL_PREFIXES)
    raise ValueError(f"not the authors' checkpoint: no key {expected}")


def authors_name(ours: str, prefix: str = LANGUAGE_MODEL_PREFIXES[0]) -> str:
    """Their name of our tensor; for one under LoRA without its `base_layer`."""
    if ours.startswith("language_model."):
        return prefix + ours.removeprefix("language_model.")
    if ours.startswith("vision_model."):
        _, module, rest = ours.split(".", 2)
        return f"vision_model.{TRUNK_INDEX[module]}.{rest}"
    for pattern, replacement in FUSION_NAMES:
        if re.match(pattern, ours):
            return re.sub(pattern, replacement, ours)
    raise ValueError(f"{ours}: a tensor of this model that the authors' code does not have")


def _plan(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """For each tensor of ours, theirs: [weight] or [base weight, LoRA A, LoRA B]."""
    prefix = _language_model_prefix(shapes)
    with torch.device("meta"):
        wanted = BioD2CForConditionalGeneration(authors_config(shapes)).state_dict()
    sources: dict[str, list[str]] = {}
    for ours, tensor in wanted.items():
        name = authors_name(ours, prefix)
        stem = name.removesuffix(".weight")
        base = next((key for key in (f"{stem}.base_layer.weight", name) if key in shapes), None)
        if base is None:
            raise ValueError(f"missing key {name}")
        expected = () if base == "beta" else tuple(tensor.shape)  # ours has one dimension
        if shapes[base] != expected:
            raise ValueError(f"{base}: shape {shapes[base]}, expected {expected}")
        lora = sorted(key for key in shapes if key.startswith(f"{stem}.lora_"))
        if lora:
            _check_lora(stem, lora, shapes, shapes[base])
        sources[ours] = [base, *lora]
    left_over = set(shapes) - {key for keys in sources.values() for key in keys}
    if unknown := sorted(key for key in left_over if not DEAD.search(key)):
        raise ValueError(f"{len(unknown)} unknown keys, such as {unknown[0]}")
    return sources


def _check_lora(stem: str, lora: list[str], shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> None:
    if [key.removeprefix(f"{stem}.").split(".")[0] for key in lora] != ["lora_A", "lora_B"]:
        raise ValueError(f"{stem}: expected one lora_A and one lora_B, found {lora}")
    rank, (height, width) = shapes[lora[0]][0], weight
    for key, expected in zip(lora, ((rank, width), (height, rank)), strict=True):
        if shapes[key] != expected:
            raise ValueError(f"{key}: shape {shapes[key]}, expected {expected}")


def _build(
    theirs: list[str], get: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, ...]], merge_lora: bool
) -> Tensor:
    weight = get(theirs[0])
    if len(theirs) == 1 or not merge_lora:
        return weight.reshape(1) if theirs[0] == "beta" else weight
    down, up = get(theirs[1]).float(), get(theirs[2]).float()  # A [r, in], B [out, r]
    return (weight.float() + LORA_ALPHA / shapes[theirs[1]][0] * up @ down).to(weight.dtype)


def convert_biod2c_checkpoint(
    file: Path, folder: Path, tokenizer: str, adapter: bool = False, max_shard_size: str = "2GB"
) -> None:
    """Write the authors' `model.safetensors` as a folder that `from_pretrained` opens, processor included.

    With `adapter` the language model keeps its base weights and LoRA goes to `folder/adapter` for PEFT.

    Raises:
        ValueError: for a file that is not the authors', or lies where its own conversion would be written.
    """
    if file.resolve().parent == folder.resolve():
        raise ValueError(f"{folder}: holds {file.name} itself, which would be overwritten; name another folder")
    processor = BioD2CProcessor(
        BioD2CImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD),
        AutoTokenizer.from_pretrained(tokenizer),
        question_template="{bos}Question: {question} Answer:",
        chat_template=AUTHORS_CHAT_TEMPLATE,
    )
    with safe_open(file, framework="pt") as reader:
        shapes = {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}
        sources = _plan(shapes)
        if adapter and not any(len(theirs) == 3 for theirs in sources.values()):
            raise ValueError(f"{file}: has no LoRA tensors to write as an adapter")
        config = authors_config(shapes)
        config.image_token_id = processor.image_token_id
        dtype = reader.get_tensor(sources["language_model.lm_head.weight"][0]).dtype
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = BioD2CForConditionalGeneration(config).to(dtype)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=1, pad_token_id=0)
        _save_all_but_weights(model, folder)
        split = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=max_shard_size)
        for name, keys in split.filename_to_tensors.items():
            shard = {key: _build(sources[key], reader.get_tensor, shapes, not adapter).contiguous() for key in keys}
            save_file(shard, folder / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if adapter:
            _save_adapter(sources, reader.get_tensor, shapes, folder)
    dropped = [key for key in shapes if DEAD.search(key)]
    print(f"dropped {len(dropped)} tensors that no forward pass uses (decoder_hpm, query_embed2, fc_hpm)")
    processor.save_pretrained(folder)


def _save_all_but_weights(model: BioD2CForConditionalGeneration, folder: Path) -> None:
    """Configuration and code files, as save_pretrained writes them, from a model on the meta device."""
    model.save_pretrained(folder, state_dict={})
    for empty in folder.glob("model*.safetensors*"):
        empty.unlink()


def _save_adapter(
    sources: dict[str, list[str]], get: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    from peft import LoraConfig

    tensors, rank = {}, 0
    for ours, theirs in sources.items():
        if len(theirs) == 3:
            rank = shapes[theirs[1]][0]
            stem = f"base_model.model.{ours.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = get(theirs[1]), get(theirs[2])
    target = folder / "adapter"
    config = LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.1, target_modules=r"language_model\..*(q_proj|v_proj)",
        base_model_name_or_path=str(folder.resolve()),
    )  # fmt: skip
    config.save_pretrained(str(target))
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def convert_pmc_clip_checkpoint(file: Path, folder: Path, attention_pool: bool = False) -> None:
    """Write PMC-CLIP's pickled checkpoint as a `BioD2CVisionModel`: the trunk at 512 pixels that BioD2C uses, or, with
    `attention_pool`, the whole encoder at 224 pixels for the figure filter.

    The pickle is opened with weights_only, which runs no code of it; its SHA-256 is printed for the record.

    Raises:
        ValueError: for a file that holds anything but tensors, or another model's.
    """
    with file.open("rb") as stream:
        print(f"{file.name}: sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0] or "it ends too early"
        raise ValueError(f"{file}: not a checkpoint of plain tensors ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(checkpoint).__name__}")
    state_dict = convert_pmc_clip_state_dict(checkpoint.get("state_dict", checkpoint))
    config = BioD2CVisionConfig(attention_pool=True, image_size=224) if attention_pool else BioD2CVisionConfig()
    model = BioD2CVisionModel(config)
    if not attention_pool:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(("layer4.", "attnpool."))}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # it names the keys
        raise ValueError(f"{file}: not PMC-CLIP's image encoder: {error}") from error
    model.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="biod2c convert", description=__doc__.split("\n\n")[0])
    systems = parser.add_subparsers(dest="system", required=True)
    authors = systems.add_parser("biod2c", help="the authors' model.safetensors")
    authors.add_argument("--tokenizer", required=True, help="folder or Hub name of the language model's tokenizer")
    authors.add_argument("--adapter", action="store_true", help="keep LoRA apart, as a PEFT adapter in FOLDER/adapter")
    clip = systems.add_parser("pmc-clip", help="PMC-CLIP's checkpoint.pt")
    clip.add_argument("--attention_pool", action="store_true", help="the whole encoder, for the figure filter")
    for system in (authors, clip):
        system.add_argument("file", type=Path)
        system.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if not args.file.is_file():
        raise ValueError(f"{args.file}: no such file")
    if args.system == "biod2c":
        convert_biod2c_checkpoint(args.file, args.folder, args.tokenizer, args.adapter)
    else:
        convert_pmc_clip_checkpoint(args.file, args.folder, args.attention_pool)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    from biod2c.cli import run

    sys.exit(run("convert", sys.argv[1:]))
