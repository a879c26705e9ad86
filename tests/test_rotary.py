from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.model.rotary import Rotary
from expertmesh.model.spec import RotarySpec
from tests import plain
from tests.decoders import CPU, PLAIN, frequencies

WIDTH = 12


def rotary(spec: RotarySpec, context: int = 400) -> Rotary:
    return Rotary(replace(PLAIN, rotary=spec, context=context), CPU)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_place(spec: RotarySpec, turned: Tensor) -> Tensor:
    """Turned rows with the pairs where they were; the product leaves the halves of interleaved pairs apart."""
    if not spec.interleaved:
        return turned
    half = len(spec.frequencies)
    result = turned.clone()
    result[..., 0 : 2 * half : 2], result[..., 1 : 2 * half : 2] = turned[..., :half], turned[..., half : 2 * half]
    return result


@pytest.mark.parametrize(
    "spec",
    [
        RotarySpec(frequencies(6)),
        RotarySpec(frequencies(6), interleaved=True),
        RotarySpec(frequencies(3)),
        RotarySpec(frequencies(3), interleaved=True, magnitude=1.4),
        RotarySpec(frequencies(6, theta=500.0), magnitude=0.7),
        RotarySpec(),
    ],
    ids=str,
)
def test_each_pair_is_turned_as_a_complex_number(spec: RotarySpec) -> None:
    x_THd = normal(300, 2, WIDTH)
    got = in_place(spec, rotary(spec).at(torch.arange(300)).turn(x_THd))
    np.testing.assert_allclose(got.numpy(), plain.rotated(spec, x_THd.double().numpy()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_product_of_turned_rows_depends_on_their_distance(interleaved: bool) -> None:
    table = rotary(RotarySpec(frequencies(6), interleaved=interleaved))
    q, k = normal(1, 1, WIDTH, seed=1), normal(1, 1, WIDTH, seed=2)

    def product(query_at: int, key_at: int) -> float:
        turned = (table.at(torch.tensor([at])).turn(x) for x, at in ((q, query_at), (k, key_at)))
        return float(torch.mul(*turned).sum())

    assert product(7, 3) == pytest.approx(product(307, 303), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_positions_may_stand_in_any_order_and_the_rows_do_not_notice() -> None:
    table, x_THd = rotary(RotarySpec(frequencies(6))), normal(50, 3, WIDTH)
    positions = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:50]
    together = table.at(positions).turn(x_THd)
    for row in range(50):
        assert torch.equal(table.at(positions[row : row + 1]).turn(x_THd[row : row + 1]), together[row : row + 1])


def test_the_first_position_is_not_turned_and_the_rest_of_a_head_never_is() -> None:
    x_THd = normal(5, 2, WIDTH)
    turned = rotary(RotarySpec(frequencies(3))).at(torch.arange(5)).turn(x_THd)
    assert torch.equal(turned[0], x_THd[0])
    assert torch.equal(turned[..., 6:], x_THd[..., 6:])
    assert (turned[1:, :, :6] != x_THd[1:, :, :6]).all()


def test_angles_of_far_positions_are_rounded_as_in_the_field() -> None:
    context, frequency = 131_072, 0.7498942
    table = rotary(RotarySpec((frequency,)), context)
    x_THd = torch.tensor([[[1.0, 0.0]]])
    for position in (1, 4_097, 131_071):
        angle = np.float32(position) * np.float32(frequency)
        wanted = [np.cos(np.float64(angle)), np.sin(np.float64(angle))]
        turned = table.at(torch.tensor([position])).turn(x_THd)
        np.testing.assert_allclose(turned[0, 0].numpy(), wanted, atol=1e-7, rtol=0)


def test_rows_in_bfloat16_are_turned_in_float32() -> None:
    x_THd = normal(4, 2, WIDTH).bfloat16()
    rotation = rotary(RotarySpec(frequencies(6))).at(torch.arange(4))
    assert torch.equal(rotation.turn(x_THd), rotation.turn(x_THd.float()))
    nothing = rotary(RotarySpec()).at(torch.arange(4)).turn(x_THd)
    assert nothing.dtype == torch.float32
    assert torch.equal(nothing, x_THd.float())


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_are_those_of_transformers(interleaved: bool) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb,
        apply_rotary_pos_emb_interleave,
    )

    spec = RotarySpec(frequencies(6), interleaved)
    q, k = normal(40, 2, WIDTH, seed=1), normal(40, 2, WIDTH, seed=2)
    angles = torch.arange(40)[:, None].float() * torch.tensor(spec.frequencies)
    cos, sin = (part.repeat(1, 2)[None] for part in (angles.cos(), angles.sin()))
    apply = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    wanted_q, wanted_k = apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rotation = rotary(spec).at(torch.arange(40))
    got = rotation.turn(q).transpose(0, 1) @ rotation.turn(k).permute(1, 2, 0)
    torch.testing.assert_close(got, (wanted_q @ wanted_k.transpose(2, 3))[0], atol=1e-4, rtol=0)
