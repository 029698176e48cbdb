"""Marks of single parameters of a test."""

import pytest


def slow(*values):
    """A set of parameters that the fast stage leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_unless(is_fast, parameters):
    """`parameters`, of which the fast stage keeps those for which `is_fast(*values)` holds."""
    tuples = [values if isinstance(values, tuple) else (values,) for values in parameters]
    return [pytest.param(*values) if is_fast(*values) else slow(*values) for values in tuples]
