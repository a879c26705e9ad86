"""MKL's vector functions, called once while nothing else runs.

torch computes `exp` and others of an array with MKL, in several threads from 2,048 numbers up. MKL looks for a
function's kernel when it is first called. If two threads call first, one of them may be given a kernel of lower
accuracy for that call: `exp` is then off by up to 1.5e-4 of its value, and the next call is right again. Seen with
oneMKL 2024.2, which torch 2.13 carries, in 29 of 800 processes whose first `exp` was shared by two threads, and in none
of 9,600 that had called it for one number before (https://github.com/pytorch/pytorch/issues/188792).
"""

from __future__ import annotations

import torch

_USED = (torch.exp, torch.log, torch.sqrt)  # by stages, by training, and by its optimizer


def settle() -> None:
    """Calls each of them for a single number, which no other thread shares."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in _USED:
            function(one)
