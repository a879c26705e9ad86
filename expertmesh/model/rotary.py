"""Rotary position embedding: queries and keys turned by an angle that grows with the position."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertmesh.model.spec import ModelSpec


class Rotary:
    """Cosine and sine of every position, looked up rather than computed, so that no row depends on its company.

    The angle is rounded to float32 as the field's implementations do; its cosine and sine are computed in float64.

    Args:
        spec: The model.
        device: Where the table is kept.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        rotary = spec.rotary
        self.device = device
        self.interleaved = rotary.interleaved
        self.width = 2 * len(rotary.frequencies)
        frequencies_R = np.array(rotary.frequencies, np.float32)
        angles_SR = (np.arange(spec.context, dtype=np.float32)[:, None] * frequencies_R).astype(np.float64)
        table_2SR = np.stack([np.cos(angles_SR), np.sin(angles_SR)]) * rotary.magnitude
        with torch.inference_mode(False):  # it outlives whatever it is made in, training too
            self._table_2SR = torch.from_numpy(table_2SR.astype(np.float32)).to(device)

    def at(self, positions_T: Tensor) -> Rotation:
        """The rotation of the rows that stand at these positions."""
        cos_TR, sin_TR = self._table_2SR[:, positions_T]
        return Rotation(cos_TR[:, None], sin_TR[:, None], self.interleaved)


class Rotation:
    """What rows at certain positions are turned by.

    Args:
        cos_T1R: Cosines.
        sin_T1R: Sines.
        interleaved: Whether a pair is two neighbours instead of an element of each half.
    """

    def __init__(self, cos_T1R: Tensor, sin_T1R: Tensor, interleaved: bool) -> None:
        self._cos = cos_T1R[:, :, None]
        self._sines = torch.stack([sin_T1R, -sin_T1R], dim=2)
        self._interleaved = interleaved

    def turn(self, x_THd: Tensor) -> Tensor:
        """Turns the first elements of every head, as many as there are angles for; gives float32."""
        width = 2 * self._cos.shape[-1]
        if not width:
            return x_THd.float()
        turned = x_THd[..., :width].float()
        pairs = (
            torch.unflatten(turned, -1, (-1, 2)).transpose(-1, -2)
            if self._interleaved
            else torch.unflatten(turned, -1, (2, -1))
        )
        # the left one times cosine minus the right one times sine, and the right times cosine plus the left times sine
        both = (pairs * self._cos).add_((pairs * self._sines).flip(-2)).flatten(-2)
        return both if width == x_THd.shape[-1] else torch.cat([both, x_THd[..., width:].float()], dim=-1)
