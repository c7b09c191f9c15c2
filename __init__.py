"""BioD2C: biomedical visual question answering with dual-level semantic consistency (arXiv:2503.02476).

The repository's root is this package and a Hugging Face model repo at once. The public names are imported on first
use: the console script, the dataset builder and `biod2c.__version__` must not pay for importing torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_biod2c import BioD2CConfig, BioD2CVisionConfig
    from .image_processing_biod2c import BioD2CImageProcessor
    from .modeling_biod2c import BioD2CForConditionalGeneration, BioD2CVisionModel
    from .processing_biod2c import BioD2CProcessor

__version__ = "0.1.0"

__all__ = [
    "BioD2CConfig",
    "BioD2CForConditionalGeneration",
    "BioD2CImageProcessor",
    "BioD2CProcessor",
    "BioD2CVisionConfig",
    "BioD2CVisionModel",
]

_MODULE_OF = {
    "BioD2CConfig": "configuration_biod2c",
    "BioD2CForConditionalGeneration": "modeling_biod2c",
    "BioD2CImageProcessor": "image_processing_biod2c",
    "BioD2CProcessor": "processing_biod2c",
    "BioD2CVisionConfig": "configuration_biod2c",
    "BioD2CVisionModel": "modeling_biod2c",
}


def __getattr__(name: str) -> object:
    """Import a public class from its module the first time it is asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
