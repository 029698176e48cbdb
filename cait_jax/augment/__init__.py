"""Augmentation on the accelerator, as pure functions of keys and batches inside the jitted training step."""
