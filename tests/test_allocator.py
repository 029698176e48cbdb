"""Freed memory stays with a process that computes on CPUs, so that its pages fault in once."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import resource
    import jax
    from cait_jax.allocator import keep_freed_memory
    from cait_jax.cores import use_cores

    use_cores()
    import numpy as np

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    np.ones(2**26, np.uint8)
    before = faults()
    for _ in range(10):
        np.ones(2**26, np.uint8)
    print(faults() - before)
    """
)
PAGES = 10 * 2**26 // 4096


def pages_faulted(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    environment = kept | {"JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, "-c", PROGRAM]
    return int(subprocess.check_output(command, env=environment, text=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_pages_of_a_large_block_fault_in_once_and_the_user_can_keep_glibcs_way():
    assert pages_faulted() < PAGES / 100
    # Of a system with huge pages for everybody a block takes fewer faults.
    assert pages_faulted(MALLOC_TOP_PAD_="131072") > 10 * pages_faulted()
