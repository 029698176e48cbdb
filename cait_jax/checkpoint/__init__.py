"""Checkpoints on disk: written by Orbax, committed with checksums, restored strictly."""
