"""What threads that compute keep of the memory that they freed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

FAULTS = textwrap.dedent("""
    import resource, sys, threading
    from dinoray.memory.allocator import keep_freed
    import numpy as np
    if sys.argv[1] == "kept":
        keep_freed()
    def work():
        def forward():
            held = [np.empty(1_500_000, np.float32) for _ in range(5)]
            for block in held:
                block[::1024] = 1
        forward()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(20):
            forward()
        print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_thread_does_not_fault_the_same_memory_in_again_and_again() -> None:
    given_back, kept = (int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
                        for how in ("default", "kept"))
    assert given_back > 20 * 1000, "what this is about: 30 MB are faulted in every time"
    assert kept < 1000
