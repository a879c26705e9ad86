"""What a process frees stays with it, so that the next pass pays no page faults for the same memory."""

import platform
import subprocess
import sys

import pytest

PASSES = 20
BLOCKS = """
import resource
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
    blocks = [bytes(1) * 2**20 for _ in range(8)]
run()
before = faults()
for _ in range({passes}):
    run()
print(faults() - before)
"""


def faults_of_passes(first: str) -> int:
    """Page faults of passes that each need 8 MiB in blocks of 1 MiB, in a process of their own."""
    program = BLOCKS.format(first=first, passes=PASSES)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep memory")
def test_memory_that_is_freed_is_there_for_the_next_pass() -> None:
    page_faults_of_all = 8 * 2**20 // 4096 * PASSES
    assert faults_of_passes("") > page_faults_of_all // 2  # else there is nothing to save
    assert faults_of_passes("from expertmesh.rpc import heap; heap.keep_freed()") < page_faults_of_all // 20


LOADING = """
import psutil
from expertmesh.rpc import heap
heap.keep_freed()
loaded = [bytes(1) * 2**20 for _ in range(24)]
stays = bytes(1) * 2**20
loaded.clear()
before = psutil.Process().memory_info().rss
heap.leave_loaded_alone()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
def test_what_loading_has_freed_is_given_back() -> None:
    ended = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, check=True, timeout=60)
    assert int(ended.stdout) > 20 * 2**20
