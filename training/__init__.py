"""Training of BioD2C: what a recipe says, the model it starts from, its batches, and the Trainer. `train_hf.py` runs
it."""
