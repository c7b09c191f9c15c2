"""Figures to feature vectors: PMC-CLIP's image encoder (paper section 2), or a vision model of transformers that pools.

`biod2c convert pmc-clip FILE FOLDER --attention_pool` makes the folder. A figure is squashed to the encoder's square,
as PMC-CLIP was trained. Where a figure does not decode, the reason stands in the features' place.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig

from ...configuration_biod2c import BioD2CVisionConfig
from ...image_processing_biod2c import BioD2CImageProcessor, upright_rgb
from ...modeling_biod2c import BioD2CVisionModel
from ..images import decode
from .figures import Figures

BATCH_SIZE = 64

Features = Tensor | str  # [D], or why the figure cannot be read


class Encoder:
    """A frozen image encoder and its image processor, from a folder. ValueError where the folder holds neither."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder}: no config.json; give an encoder's folder, such as "
                "`biod2c convert pmc-clip checkpoint.pt FOLDER --attention_pool` writes"
            )
        self.folder = folder
        self.sha256 = _folder_digest(folder)
        self.model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.prepare = self._load()
        self.model = model.to(self.device).eval()

    def _load(self) -> tuple[torch.nn.Module, Callable[[Image.Image], Tensor]]:
        if self.model_type != BioD2CVisionConfig.model_type:
            processor = AutoImageProcessor.from_pretrained(self.folder)
            return AutoModel.from_pretrained(self.folder), partial(_processed, processor)
        model = BioD2CVisionModel.from_pretrained(self.folder)
        if not model.config.attention_pool:
            raise ValueError(f"{self.folder}: has no attention pool; convert PMC-CLIP's file with --attention_pool")
        return model, partial(_squashed, model.config.image_size)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """What `prepare` made of I figures, [I, 3, H, W], -> features [I, D] on the CPU."""
        pixels = pixels.to(self.device)
        if pixels.dtype == torch.uint8:
            mean, std = (
                torch.tensor(values, device=self.device)[:, None, None]
                for values in (BioD2CImageProcessor.image_mean, BioD2CImageProcessor.image_std)
            )
            pixels = (pixels / 255 - mean) / std
        output = self.model(pixel_values=pixels)
        if self.model_type == BioD2CVisionConfig.model_type:
            return output.image_features.cpu()
        if getattr(output, "pooler_output", None) is None:
            raise ValueError(f"{self.folder}: a {self.model_type} model pools nothing; give one with a pooler_output")
        return output.pooler_output.flatten(1).cpu()


def _squashed(side: int, image: Image.Image) -> Tensor:
    """uint8 [3, side, side]: BioD2CImageProcessor's resizing. Its normalisation, half of its time, is left to `encode`,
    which does it for a batch at once.
    """
    pixels = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _processed(processor: Any, image: Image.Image) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _folder_digest(folder: Path) -> str:
    """sha256 of the configuration, the image processor and the weights: the encoder's identity wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            digest.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class _Pixels(Dataset):
    """(sha256, pixels [3, H, W] or why there are none) of each figure; what a loader's worker runs."""

    def __init__(self, figures: Figures, shas: Sequence[str], prepare: Callable[[Image.Image], Tensor]) -> None:
        self.figures, self.shas, self.prepare = figures, shas, prepare

    def __len__(self) -> int:
        return len(self.shas)

    def __getitem__(self, index: int) -> tuple[str, Features]:
        sha = self.shas[index]
        try:
            image = upright_rgb(decode(self.figures.image(sha)))
        except ValueError as error:  # BadImageError is one
            return sha, str(error)
        return sha, self.prepare(image)


def encode_figures(
    encoder: Encoder, figures: Figures, shas: Sequence[str], workers: int = 0
) -> Iterator[list[tuple[str, Features]]]:
    """Yield batches of (sha256, features) in the order of `shas`; `workers` processes decode ahead."""
    pixels = _Pixels(figures, shas, encoder.prepare)
    for batch in DataLoader(pixels, BATCH_SIZE, num_workers=workers, collate_fn=list):
        readable = [values for _, values in batch if isinstance(values, Tensor)]
        features: Iterator[Tensor] = iter(encoder.encode(torch.stack(readable)) if readable else [])
        yield [(sha, values if isinstance(values, str) else next(features)) for sha, values in batch]


def cached_features(
    encoder: Encoder, figures: Figures, shas: Sequence[str], cache: Path, workers: int = 0
) -> dict[str, Features]:
    """Features by sha256; a batch is stored under `cache` once it is there, by the encoder's identity, and not encoded
    again.
    """
    folder = cache / encoder.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Features] = {}
    stored = sorted(folder.glob("*.safetensors"))
    for path in stored:
        with safe_open(path, "pt") as file:
            found |= {sha: file.get_tensor(sha) for sha in file.keys()}
    missing = [sha for sha in shas if sha not in found]
    for number, batch in enumerate(encode_figures(encoder, figures, missing, workers), len(stored)):
        found |= dict(batch)
        features = {sha: values.clone() for sha, values in batch if isinstance(values, Tensor)}
        partial = folder / "partial"
        save_file(features, partial)
        partial.rename(folder / f"{number:05d}.safetensors")
    return {sha: found[sha] for sha in shas}
