"""What a run under DeepSpeed needs before its model is built, and what this machine cannot run.

Unusual here: DeepSpeed compiles C++ parts at their first use (a minute each), and torch marks a folder in which it
compiles with a file `lock`. A run killed meanwhile leaves it there, and every later one waits for it in silence. So the
part that is needed is compiled here, under a lock of the operating system's, which dies with its process: a `lock`
found then is such a leftover.
"""

import fcntl
import gc
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed


def for_this_machine(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys, with what this machine adds to them.

    Raises:
        ValueError: for FSDP without a GPU, or DeepSpeed that was not installed, not launched or not configured.
    """
    without_gpu = bool(values.get("use_cpu")) or not torch.cuda.is_available()
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if (values.get("fsdp") or by_launcher) and without_gpu:
        # accelerate would train plain DDP, every process with the whole model, and say nothing
        raise ValueError("fsdp needs GPUs; without one, share the model among processes by deepspeed (zero3.json)")
    if not values.get("deepspeed"):
        return dict(values)
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError("deepspeed is not installed: pip install 'biod2c[deepspeed]'") from error
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("deepspeed needs its launcher or torchrun: torchrun --nproc_per_node 4 train_hf.py RECIPE ...")
    # else accelerate, which finds no GPU, would take each process for the only one
    return {**values, **_precision_to_deepspeed(values), "use_cpu": without_gpu}


def _precision_to_deepspeed(values: dict[str, Any]) -> dict[str, Any]:
    """`bf16: true` means torch's autocast under DeepSpeed too: what learns stays in float32, as in every other run.

    DeepSpeed's own bf16 casts all weights, and a step of 5e-5 changes few numbers of 16 bits.
    """
    path = Path(values["deepspeed"])
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as DeepSpeed's JSON: {error}") from error
    if own := sorted({"bf16", "fp16", "torch_autocast"} & config.keys()):
        raise ValueError(f"{path}: remove {', '.join(own)}; the recipe's bf16 or fp16 says the precision")
    for field, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if values.get(field):
            # no "safe" modules: their weights would travel in 16 bits, and after a restart in 32, with other losses
            config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return {"deepspeed": config, "bf16": False, "fp16": False}


def mixed_precision(arguments: TrainingArguments) -> torch.dtype | None:
    """What a run's autocast computes in: torch.bfloat16, torch.float16 or None, without it."""
    under_deepspeed = (arguments.deepspeed or {}).get("torch_autocast", {}).get("dtype")
    if under_deepspeed:
        return getattr(torch, under_deepspeed)
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def start_deepspeed(arguments: TrainingArguments) -> None:
    """Join the processes, before the model is built."""
    if not arguments.deepspeed:
        return
    import deepspeed

    leave_frozen_weights_out(deepspeed.DeepSpeedEngine)
    # DeepSpeed calls these by names that torch is about to drop, and torch says so hundreds of times a step
    warnings.filterwarnings("ignore", message=r".*(reduce_scatter|all_gather_into)_tensor", category=FutureWarning)
    if not arguments.use_cpu:
        deepspeed.init_distributed()
        return
    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        raise ValueError("use_cpu with deepspeed: set DS_ACCELERATOR=cpu before the launcher")
    build_cpu_ops()
    deepspeed.init_distributed(dist_backend="gloo")


def leave_frozen_weights_out(engine: Any) -> None:
    """DeepSpeed's checkpoints are to hold what is trained alone; transformers asks it so for PEFT's models only."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @wraps(save)
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        return save(self, *args, **{**kwargs, "exclude_frozen_parameters": True})

    @wraps(load)
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, *args, **{**kwargs, "load_module_strict": False})

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def leave_processes() -> None:
    """Part from the other processes when all are done: one that leaves with a connection open may be aborted."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()  # DeepSpeed's engine, in a cycle, holds connections of its own
        torch.distributed.destroy_process_group()


def build_cpu_ops() -> None:
    """Compile the C++ part that processes without a GPU use into TORCH_EXTENSIONS_DIR, unless it is there."""
    from deepspeed.accelerator import get_accelerator

    default = Path.home() / ".cache" / "biod2c" / "torch_extensions"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for leftover in folder.glob("*/lock"):
            leftover.unlink()
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)  # sums over shared memory


@contextmanager
def whole_model() -> Iterator[None]:
    """Build a model whole in every process's memory; ZeRO-3 splits it when training starts.

    Else transformers would split the parts inside the model before their weights are drawn, which fails.
    """
    # transformers keeps this configuration by a weak reference; the Trainer's arguments hold it
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
