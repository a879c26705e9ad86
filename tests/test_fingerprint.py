from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import expertmesh
from expertmesh.model import invariant
from expertmesh.model.fingerprint import take_profile
from expertmesh.model.layers import RMSNorm
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RotarySpec, RouterSpec
from expertmesh.serving.passes import are_exact
from tests.conftest import ROOT
from tests.decoders import CPU, LATENT, PLAIN, SPECS, frequencies

CLASSIFIER = ModelSpec(
    width=48,
    layers=2,
    context=128,
    embedding=EmbeddingSpec(300, bigram_buckets=97, bigram_width=8),
    attention=AttentionSpec(heads=4),
    router=RouterSpec(experts=8, top_k=2),
    expert=ExpertSpec(width=36),
    head=HeadSpec(labels=("world", "sports", "business", "science")),
)
ALL = {"classifier": CLASSIFIER, **SPECS}


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def taken(spec: ModelSpec) -> str:
    return take_profile(spec, CPU).fingerprint


@pytest.mark.parametrize("name", ALL)
def test_one_process_has_one_fingerprint_on_any_number_of_threads(name: str) -> None:
    first = taken(ALL[name])
    torch.set_num_threads(2)
    assert taken(ALL[name]) == first


def test_a_profile_names_device_dtype_features_build_and_fingerprint() -> None:
    for spec, dtype in ((PLAIN, "fp32"), (replace(PLAIN, dtype="bfloat16"), "bf16"), (CLASSIFIER, "fp32")):
        profile = take_profile(spec, CPU)
        features = torch.backends.cpu.get_cpu_capability()
        assert profile.name == f"cpu-{dtype} {features} torch-{torch.__version__} {profile.fingerprint}"
        assert len(bytes.fromhex(profile.fingerprint)) == 8


def test_other_widths_have_other_fingerprints() -> None:
    assert len({taken(spec) for spec in ALL.values()}) > len(ALL) // 2
    assert taken(PLAIN) != taken(replace(PLAIN, dtype="bfloat16"))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there are no other code paths")
def test_other_code_paths_of_one_build_have_other_fingerprints_and_other_processes_the_same() -> None:
    names = ("classifier", "grouped", "sigmoid", "latent in bfloat16")
    command = (
        "import torch; torch.set_num_threads(1); from tests.test_fingerprint import ALL, taken;"
        f"print(torch.backends.cpu.get_cpu_capability(), *[taken(ALL[name]) for name in {names!r}])"
    )

    def told(**settings: str) -> list[str]:
        ran = subprocess.run(
            [sys.executable, "-c", command],
            cwd=Path(expertmesh.__file__).parents[1],
            env={**os.environ, **settings},
            capture_output=True,
            check=True,
        )
        return ran.stdout.decode().split()

    here = [taken(ALL[name]) for name in names]
    assert told() == [torch.backends.cpu.get_cpu_capability(), *here]
    plain, *others = told(ATEN_CPU_CAPABILITY="default")
    assert plain == "DEFAULT"
    assert all(one != other for one, other in zip(here, others, strict=True))


def bent(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation, but one number of what it gives is off by one unit in the last place."""

    def bent_operation(*arguments: Any, **settings: Any) -> Tensor:
        result = operation(*arguments, **settings).clone()
        flat = result.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf, dtype=flat.dtype))
        return result

    return bent_operation


@pytest.mark.parametrize(
    ("name", "holder", "operation"),
    [
        ("classifier", invariant, "linear"),
        ("classifier", invariant, "silu"),
        ("classifier", invariant, "bidirectional_attention"),
        ("classifier", functional, "layer_norm"),
        ("classifier", torch, "softmax"),
        ("grouped", invariant, "linear"),
        ("grouped", invariant, "silu"),
        ("grouped", invariant, "sigmoid"),
        ("grouped", invariant, "causal_attention"),
        ("grouped", RMSNorm, "forward"),
        ("grouped", torch, "softmax"),
        ("grouped", torch, "exp"),
        ("layer norm", functional, "layer_norm"),
        ("latent", invariant, "causal_attention"),
        ("latent", RMSNorm, "forward"),
        ("latent in bfloat16", invariant, "linear"),
        ("latent in bfloat16", invariant, "causal_attention"),
    ],
)
def test_one_bit_in_one_operation_is_another_fingerprint(
    name: str, holder: Any, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = taken(ALL[name])
    monkeypatch.setattr(holder, operation, bent(getattr(holder, operation)))
    assert taken(ALL[name]) != before


@pytest.mark.parametrize("name", ["classifier", "grouped", "latent", "gated shared expert", "dense layers"])
def test_products_are_as_wide_inside_as_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, inner = ALL[name], set()
    linear = invariant.linear

    def noted(x_ND: Tensor, weight_OD: Tensor, *others: Any) -> Tensor:
        inner.add(x_ND.shape[1])
        return linear(x_ND, weight_OD, *others)

    monkeypatch.setattr(invariant, "linear", noted)
    taken(spec)
    attention, dense = spec.attention, spec.dense
    wanted = {spec.width, spec.expert.width, dense.width, dense.shared_width, spec.embedding.bigram_width} - {0}
    if attention.kind == "grouped":
        wanted |= {attention.heads * attention.head_width}
    if attention.kind == "latent":
        wanted |= {attention.query_rank, attention.latent_rank, attention.head_width}
        wanted |= {attention.heads * attention.value_width}
    if attention.kind == "bidirectional":
        wanted |= {2 * spec.width}
    assert inner == wanted


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_a_large_models_fingerprint_is_quickly_taken(kind: str) -> None:
    attention = {
        "grouped": AttentionSpec(32, "grouped", kv_heads=8, head_width=128),
        "latent": AttentionSpec(32, "latent", head_width=128, value_width=128, query_rank=1536, latent_rank=512),
    }[kind]
    spec = replace(
        LATENT if kind == "latent" else PLAIN,
        width=4096,
        attention=attention,
        rotary=RotarySpec(frequencies(32)),
        expert=ExpertSpec(14336),
        embedding=EmbeddingSpec(128_000, learned_positions=False),
    )
    taken(spec)
    started_s = process_time()
    taken(spec)
    assert process_time() - started_s < 1.0  # a tenth of a second where nothing else runs


def test_a_processor_on_which_products_are_uneven_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CLASSIFIER
    assert are_exact({take_profile(spec, CPU).name})
    monkeypatch.setattr(invariant, "linear", lambda x, weight, bias=None: x @ weight.t() + 1e-7 * len(x))
    name = take_profile(spec, CPU).name
    assert name.startswith("uneven-cpu-")
    assert not are_exact({name})


def test_a_processor_on_which_attention_is_uneven_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = invariant.causal_attention
    assert are_exact({take_profile(PLAIN, CPU).name})
    monkeypatch.setattr(
        invariant, "causal_attention", lambda q, *others, **more: attend(q, *others, **more) + 1e-7 * q.shape[2]
    )
    assert take_profile(PLAIN, CPU).name.startswith("uneven-cpu-")


NARROWER = """
import torch
from expertmesh.model.fingerprint import take_profile
from tests.decoders import PLAIN
from tests.test_invariant import changed_by_causal_attention, tile
torch.set_grad_enabled(False)
attention = PLAIN.attention
queries = tile(attention.head_width, attention.head_width, 1, 64, 1)
print(changed_by_causal_attention(queries, 1, range(20)), take_profile(PLAIN, torch.device("cpu")).name)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "SSE4_2"])
def test_what_is_uneven_with_other_instructions_is_seen(instructions: str) -> None:
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}
    ended = subprocess.run(
        [sys.executable, "-c", NARROWER], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    changed, name = ended.stdout.split(maxsplit=1)
    assert changed == "0" or name.startswith("uneven-cpu-")
