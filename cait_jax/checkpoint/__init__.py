"""Checkpoints on disk: written by Orbax, sealed with sums, read back strictly."""
