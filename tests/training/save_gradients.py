"""`train_hf.py`, and every parameter's gradient before each step in a file: save_gradients.py FOLDER RECIPE.yaml ..."""

import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import TrainerCallback

from biod2c import train_hf
from biod2c.training.trainer import BioD2CTrainer

folder = Path(sys.argv[1])


class SaveGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if args.process_index == 0:
            save_file(gradients, folder / f"{state.global_step}.safetensors")


class Trainer(BioD2CTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SaveGradients)


train_hf.BioD2CTrainer = Trainer
folder.mkdir(exist_ok=True)
train_hf.main(sys.argv[2:])
