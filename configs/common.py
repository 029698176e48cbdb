"""The base of every recipe: all keys with one comment each are in cait_jax/train/keys.py.

A recipe starts from these and states only what differs.
"""

from cait_jax.train.config import get_config

__all__ = ["get_config"]
