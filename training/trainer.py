"""transformers' Trainer, with both parts of the loss counted and logged exactly."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import (
    TRAINED_PARTS,
    UNFINISHED,
    has_frozen_parts,
    load_trained_parts,
    publish,
    save_trained_parts,
)
from .data import EvenRows, GroupedSampler, text_lengths
from .held_out import score_answers


class BioD2CTrainer(Trainer):
    """Trainer that normalises the semantic loss over the accumulated batch and all processes, as it does the tokens'
    loss.

    Its own `num_items_in_batch` counts label tokens; the semantic loss is a mean over rows with a queue, so these are
    counted too and travel with each batch as `num_semantic_items_in_batch`. `nll_loss` and `semantic_loss` are logged
    beside `loss`. Checkpoints appear under their names only when they are whole (see checkpoints.py).
    """

    def __init__(self, *args: Any, rows_per_image: int = 1, eval_questions: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows_per_image, self.eval_questions = rows_per_image, eval_questions
        self.saving = False
        # summed since the last log, on the device, so that no step waits: nll, semantic, rows that had the latter
        self.loss_parts = torch.zeros(3, device=self.args.device)
        self.parts_from_step: int | None = None

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        written, final = (folder / f"checkpoint-{self.state.global_step}" for folder in (run / UNFINISHED, run))
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # what an earlier kill left there
        self.accelerator.wait_for_everyone()
        self.saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.saving = False
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / "trainer_state.json"))
            publish(written, final)
            rotate_checkpoints(
                str(run),
                self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self.saving and not isinstance(self.model, PeftModel) and has_frozen_parts(self.model):
            if self.args.should_save:  # under DeepSpeed every process comes here
                save_trained_parts(self.model, state_dict, folder)
                self.processing_class.save_pretrained(folder)
            return
        super()._save(output_dir, state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that says what recipe.yaml says

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / TRAINED_PARTS).is_file():
            load_trained_parts(model or self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if (best / TRAINED_PARTS).is_file() and not self.is_deepspeed_enabled:
            load_trained_parts(self.model, best)
        else:
            super()._load_best_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if self.rows_per_image == 1 and not by_length:
            return super()._get_train_sampler(train_dataset)
        rows, seed = self.train_dataset, self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.rows_per_image > 1:
            return GroupedSampler(rows["image_sha256"], text_lengths(rows), self.rows_per_image, seed)
        # as many batches sorted among each other as transformers takes. Its own sampler draws from torch's generator,
        # and a run continued in a later epoch would see another order
        sorted_rows = 50 * self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedSampler(range(len(rows)), text_lengths(rows), 1, seed, sorted_rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """In their order, whatever the order of the training rows."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if self.args.world_size > 1:
            eval_dataset = EvenRows(self.eval_dataset, self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self.state.global_step >= self.state.max_steps:  # a finished run, started again: Trainer would go a step on
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(map(_rows_with_queue, batches), torch.tensor(0)).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        for batch in batches:
            batch["num_semantic_items_in_batch"] = count.clamp(min=1)
        return batches, None if num_items is None else num_items.clamp(min=1)  # 0 where no image could be read

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            if self.parts_from_step is None:
                self.parts_from_step = self.state.global_step
            self.loss_parts[0] += outputs["nll_loss"].detach()
            if (semantic := outputs.get("semantic_loss")) is not None:
                self.loss_parts[1] += semantic.detach()
                self.loss_parts[2] += _rows_with_queue(inputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> tuple:
        """Sums, so that the held-out losses are means over all tokens and all rows, not over batches."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, num_items_in_batch=1, num_semantic_items_in_batch=1)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        self.eval_sums[:2] += torch.stack([outputs["nll_loss"], tokens])
        if (semantic := outputs.get("semantic_loss")) is not None:
            self.eval_sums[2:] += torch.stack([semantic, _rows_with_queue(inputs)])
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self.eval_sums = torch.zeros(4, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, tokens, semantic, rows = self.accelerator.gather(self.eval_sums[None]).sum(0).tolist()
        metrics = {"nll_loss": nll / max(tokens, 1)}
        metrics["loss"] = metrics["nll_loss"]
        if rows:
            metrics["semantic_loss"] = semantic / rows
            metrics["loss"] += self.model.config.semantic_loss_weight * metrics["semantic_loss"]
        if self.eval_questions:
            model = self.accelerator.unwrap_model(self.model).eval()
            batch_size = self.args.per_device_eval_batch_size
            metrics |= score_answers(model, self.processing_class, self.eval_dataset, self.eval_questions, batch_size)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.parts_from_step is not None:
            # each process holds its share of the sums; all ask for both, whether their own rows had a queue or not
            nll, semantic, rows = self.accelerator.gather(self.loss_parts[None]).sum(0).tolist()
            steps = self.state.global_step - self.parts_from_step
            logs["nll_loss"] = nll / steps
            if rows:
                logs["semantic_loss"] = semantic / steps
            self.loss_parts.zero_()
            self.parts_from_step = None
        super().log(logs, start_time)


def _rows_with_queue(batch: dict[str, Tensor]) -> Tensor:
    present = batch["queue_attention_mask"].flatten(1).any(1)
    if "image_index" in batch:
        present = present & (batch["image_index"] >= 0)
    return present.sum()
