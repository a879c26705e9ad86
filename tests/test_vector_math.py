"""The first call that threads share, in processes that never made one: each is forked before torch has any thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROCESSES = 200
# In the child both threads wait for work without sleeping, so that they begin at the same moment.
PROGRAM = """
import os, sys
import torch
import expertmesh.model.invariant

numbers = 0.01 + (torch.arange(8192, dtype=torch.float32) % 997) / 997
wrong = 0
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        torch.set_num_threads(2)
        for _ in range(20):
            torch.neg(numbers)
        function = getattr(torch, sys.argv[1])
        first, second = function(numbers), function(numbers)
        os._exit(not torch.equal(first, second))
    wrong += os.waitpid(child, 0)[1] != 0
print(wrong)
"""


@pytest.mark.parametrize("function", ["exp", "log", "sqrt"])
def test_the_first_call_gives_what_every_other_does(function: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, function, str(PROCESSES)],
        env=os.environ | {"OMP_WAIT_POLICY": "active"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.stdout, ended.stderr) == ("0\n", "")
