"""Recipes: one short file each, over the keys of `common.py`."""
