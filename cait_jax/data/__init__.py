"""Data: a split of a data set, and batches of it as a function of seed and step."""

from cait_jax.data.pipeline import Batches, eval_batches, train_batches
from cait_jax.data.sources import Encoded, InMemory, load_split

__all__ = ["Batches", "Encoded", "InMemory", "eval_batches", "load_split", "train_batches"]
