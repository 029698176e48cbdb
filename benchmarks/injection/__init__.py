"""Faults for `benchmarks/faults.py`: how runs are started, where they are disturbed, and what must hold."""
