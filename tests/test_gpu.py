"""What CUDA is held to: the same bits in any company, alone or grouped, recorded or not; skipped where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertmesh.checkpoint.load import StageLoader
from expertmesh.model import cuda, invariant
from expertmesh.model.arrays import to_arrays, to_numpy, to_torch
from expertmesh.model.experts import ExpertGroup
from expertmesh.model.full import FullModel
from expertmesh.model.graphs import BUCKETS, Graphs
from expertmesh.model.layers import DTYPES, GatedMLP, narrow
from expertmesh.model.router import route
from expertmesh.model.spec import ExpertSpec, RouterSpec
from expertmesh.serving.passes import are_exact
from tests import decoders
from tests.conftest import ROOT
from tests.decoders import SPECS, random_model
from tests.generating import model as fixture
from tests.test_cache import changed_by_steps
from tests.test_stages import SWITCHES, changed_by_company, seeded
from tests.up import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = torch.device("cuda")
SHAPES = [(48, 36), (64, 8), (50, 1), (512, 1024), (1024, 512), (192, 16_000)]
DTYPE_NAMES = ["float32", "bfloat16"]
MOST = 300


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def changed(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Row counts up to len(x) at which some row has other bits than alone, and the same for the last rows."""
    alone = bits(torch.cat([function(row[None]) for row in x]))
    first = sum(not torch.equal(bits(function(x[:count])), alone[:count]) for count in range(1, len(x) + 1))
    last = sum(not torch.equal(bits(function(x[-count:])), alone[-count:]) for count in range(1, len(x) + 1, 7))
    return first + last


# Operations


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_rows_do_not_depend_on_how_many_share_the_pass(shape: tuple[int, int], dtype: str) -> None:
    width, outputs = shape
    x_ND, weight_OD, bias_O = (
        part.to(DTYPES[dtype]) for part in (normal(MOST, width), normal(outputs, width), normal(outputs))
    )
    for weight in (weight_OD, weight_OD.T.contiguous().T):
        assert changed(partial(invariant.linear, weight_OD=weight, bias_O=bias_O), x_ND) == 0
    many = torch.cat([x_ND] * 30)
    assert torch.equal(
        bits(invariant.linear(many, weight_OD, bias_O)), bits(invariant.linear(x_ND, weight_OD, bias_O)).repeat(30, 1)
    )
    wanted = functional.linear(x_ND.double(), weight_OD.double(), bias_O.double())
    got = invariant.linear(x_ND, weight_OD, bias_O).double()
    assert (got - wanted).norm() / wanted.norm() < {"float32": 1e-6, "bfloat16": 4e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(50, 1), (512, 1024), (3000, 70)], ids=str)
def test_no_tiling_changes_a_bit(shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width, outputs = shape
    x_ND, weight_OD = (part.to(DTYPES[dtype]) for part in (normal(MOST, width), normal(outputs, width)))
    tilings = (*cuda._TILINGS[DTYPES[dtype]], *cuda._FEW_ROWS[DTYPES[dtype]])
    monkeypatch.setattr(cuda, "_FEW_ROWS", {DTYPES[dtype]: ()})
    results = []
    for tiling in tilings:
        monkeypatch.setattr(cuda, "_TILINGS", {DTYPES[dtype]: (tiling,)})
        results.append(bits(invariant.linear(x_ND, weight_OD)))
    assert len(results) > 2
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_suite_notices_plain_products() -> None:
    x_ND, weight_OD = normal(MOST, 512), normal(1024, 512)
    assert changed(lambda rows: functional.linear(rows, weight_OD), x_ND) > 0


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_products_of_many_groups_are_those_of_one(dtype: str) -> None:
    x_GND, y_GDO = normal(40, 24, 64).to(DTYPES[dtype]), normal(40, 64, 128).to(DTYPES[dtype])
    for y in (y_GDO, y_GDO.mT.contiguous().mT):
        together = invariant.products(x_GND, y)
        for group in range(40):
            for rows in (1, 8, 17, 24):
                alone = invariant.products(x_GND[group : group + 1, :rows], y[group : group + 1])
                assert torch.equal(bits(alone[0]), bits(together[group, :rows]))


@pytest.mark.parametrize("width", [12, 48, 128, 512, 2048, 3000])
def test_sums_and_norms_do_not_depend_on_how_many_rows_there_are(width: int) -> None:
    x, weight = normal(MOST, width), normal(width)
    assert changed(invariant.row_sums, x) == 0
    assert changed(lambda rows: cuda.rms_norm(rows, weight, 1e-5), x) == 0
    assert changed(lambda rows: functional.layer_norm(rows, (width,)), x) == 0
    torch.testing.assert_close(invariant.row_sums(x).double(), x.double().sum(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "softmax_top", "sigmoid", "sparsemixer"])
@pytest.mark.parametrize("experts", [8, 64, 128])
def test_routes_do_not_depend_on_how_many_rows_there_are(score: str, experts: int) -> None:
    spec = RouterSpec(experts=experts, top_k=2 if score == "sparsemixer" else 8, score=score)
    logits_TE = normal(MOST, experts)
    assert changed(lambda rows: torch.cat([part.float() for part in route(rows, spec)], dim=1), logits_TE) == 0


# Whole models


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_gives_the_same_bits_whole_in_chunks_and_token_by_token(name: str) -> None:
    model = random_model(SPECS[name]).to(DEVICE)
    for graphs in (None, Graphs()):
        with_graphs(model, graphs)
        assert changed_by_steps(model, [1, 66, 131, 300, 7], chunks=[1, 5, 64, 70, 128, 300], seed=1) == 0


@pytest.mark.parametrize("name", [name for name in SPECS if "bfloat16" not in name])
def test_cuda_computes_what_the_processor_computes(name: str) -> None:
    ids_T = decoders.texts([150])[0]
    wanted = decoders.whole_logits(random_model(SPECS[name]), ids_T)
    got = decoders.whole_logits(random_model(SPECS[name]).to(DEVICE), ids_T).cpu()
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["grouped", "narrow window", "sinks", "latent", "grouped in bfloat16"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "eager"])
def test_one_token_at_a_time_comes_out_as_the_whole(name: str, recorded: bool) -> None:
    model = with_graphs(random_model(SPECS[name]).to(DEVICE), Graphs() if recorded else None)
    assert changed_by_steps(model, [290, 140, 3, 129], chunks=[1], seed=4) == 0
    assert not recorded or model.graphs.count > 8, "rows, blocks and layers are recorded"


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_classified_text_does_not_notice_its_company(switch: str) -> None:
    sequences = [torch.randint(0, 300, (length,)) for length in (5, 1, 128, 16, 17, 3, 64, 2, 40)]
    batches = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 6, 4, 2, 0], [1, 7], [5]]
    assert changed_by_company(seeded(lambda: FullModel(SWITCHES[switch])).to(DEVICE), sequences, batches) == 0


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_imported_checkpoints_keep_the_promise(name: str, dtype: str) -> None:
    model = StageLoader(fixture(name, dtype), DEVICE, Graphs()).full_model()
    assert changed_by_steps(model, [200, 1, 37], chunks=[1, 64, 200], seed=2) == 0


def test_the_suite_notices_a_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "serves", lambda x: False)
    model = StageLoader(ROOT / "models" / "tinytext", DEVICE).full_model()
    assert changed_by_steps(model, [300, 20, 3], chunks=[1, 9, 70], seed=3) > 0


@pytest.mark.parametrize("name", ["agnews", "tinytext"])
def test_the_mesh_on_cuda_equals_the_full_model(name: str) -> None:
    devices = [f"--device={kind}=cuda" for kind in ("embedding", "gating", "expert", "classifier", "full_model")]
    ended = run("verify", ROOT / "models" / name, "--expert-services", 2, *devices)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "cuda-fp32" in ended.stdout


def test_what_was_seen_to_be_exact_is_called_exact() -> None:
    card = torch.cuda.get_device_name(DEVICE)
    assert (
        are_exact({f"cuda-fp32 {card} 1"}) == are_exact({f"cuda-bf16 {card} 1"}) == ("H100" in card or "H200" in card)
    )


# Experts together, recordings, arrays


def experts(dtype: str, count: int = 6, bias: bool = True) -> dict[int, GatedMLP]:
    spec = ExpertSpec(width=160, bias=bias)
    made: dict[int, GatedMLP] = {2 * place: seeded(lambda: GatedMLP(96, spec), place) for place in range(count)}
    return {number: narrow(expert.to(DEVICE), DTYPES[dtype]) for number, expert in made.items()}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "eager"])
def test_an_expert_among_others_gives_what_it_gives_alone(dtype: str, recorded: bool, bias: bool) -> None:
    held = experts(dtype, bias=bias)
    graphs = Graphs() if recorded else None
    group = ExpertGroup(held, graphs)
    generator = np.random.default_rng(5)
    for turn in range(40):
        ids = sorted(generator.choice(list(held), generator.integers(1, 7), replace=False).tolist())
        counts = generator.integers(1, [3, 20, 90, 700][turn % 4], len(ids)).tolist()
        rows_ND = normal(sum(counts), 96, seed=turn).to(DTYPES[dtype])
        got = group(ids, counts, rows_ND)
        alone = [held[one](piece) for one, piece in zip(ids, rows_ND.split(counts), strict=True)]
        assert got.dtype == rows_ND.dtype
        assert torch.equal(bits(got), bits(torch.cat(alone)))
        row = generator.integers(len(rows_ND))
        owner = int(np.searchsorted(np.cumsum(counts), row, side="right"))
        assert torch.equal(bits(held[ids[owner]](rows_ND[row][None])), bits(got[row][None]))
    assert graphs is None or graphs.count


def test_experts_that_move_are_found_again() -> None:
    held = experts("float32")
    group, rows_ND = ExpertGroup(held, Graphs()), normal(9, 96)
    group([0, 2], [4, 5], rows_ND)
    for expert in held.values():
        for parameter in expert.parameters():
            parameter.data = parameter.data * 2
    wanted = torch.cat([held[0](rows_ND[:4]), held[2](rows_ND[4:])])
    assert torch.equal(group([0, 2], [4, 5], rows_ND), wanted)


def test_recordings_give_what_the_function_gives_and_are_bounded() -> None:
    graphs, calls = Graphs(most=2), []

    def double(x_ND: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x_ND))
        return x_ND * 2, x_ND.sum(dim=1)

    for rows in (3, 16, 1, 17, 60, 3, 200, 16, 60):
        x_ND = normal(rows, 8, seed=rows)
        doubled, total = graphs.run(double, x_ND)
        assert torch.equal(doubled, x_ND * 2)
        assert total.shape == (rows,)
        assert graphs.count <= 2
    recorded = len(calls)
    assert set(calls) <= set(BUCKETS)
    graphs.run(double, normal(2, 8))
    graphs.run(double, normal(50, 8))
    assert len(calls) == recorded, "two recordings that were used last are kept"
    graphs.run(double, normal(BUCKETS[-1] + 1, 8))
    assert calls[-1] == BUCKETS[-1] + 1, "too many rows are computed as they are"


def test_results_of_a_replay_outlive_the_next() -> None:
    graphs = Graphs()

    def double(x_ND: Tensor) -> tuple[Tensor]:
        return (x_ND * 2,)

    first, second = normal(5, 4, seed=1), normal(5, 4, seed=2)
    (kept,) = graphs.run(double, first)
    graphs.run(double, second)
    assert torch.equal(kept, first * 2)


@pytest.mark.parametrize("dtype", ["f4", "f2", "i4", "i8", "V2"])
def test_arrays_go_to_the_device_and_back(dtype: str) -> None:
    generator = np.random.default_rng(1)
    raw = [generator.integers(0, 100, (257, 64)).astype("i2" if dtype == "V2" else dtype) for _ in range(50)]
    arrays: list[Any] = [one.view("V2") if dtype == "V2" else one for one in raw]
    torch.cuda._sleep(50_000_000)  # so that no copy has ended when the next begins
    tensors = [to_torch(array, DEVICE) for array in arrays]
    for array in raw:
        array[:] = 0 if dtype == "V2" else -1  # what was handed over may be changed
    wanted = np.random.default_rng(1)
    for got in to_arrays(*tensors):
        assert got.dtype == np.dtype(dtype)
        again = wanted.integers(0, 100, (257, 64)).astype("i2" if dtype == "V2" else dtype)
        assert got.tobytes() == again.tobytes()
    assert to_numpy(tensors[0]).shape == (257, 64)


def with_graphs(model: FullModel, graphs: Graphs | None) -> FullModel:
    model.graphs = graphs
    model.__dict__.pop("_groups", None)  # they are made with the graphs of the moment
    for stage in model.gating:
        stage.graphs = graphs
    return model
