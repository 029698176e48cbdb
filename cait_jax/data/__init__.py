"""Data: a split of a data set, and batches of it as a function of seed and step."""

from cait_jax.data.loader import Batches, eval_batches, train_batches
from cait_jax.data.sources import load_split
from cait_jax.data.split import Encoded, InMemory

__all__ = ["Batches", "Encoded", "InMemory", "eval_batches", "load_split", "train_batches"]
