"""What an answer may be where experts are dead or broken: meshes of small models in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch

from expertmesh import wire
from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer
from expertmesh.dispatch import Applied, ApplyExperts, Gated, Scores, StageCall, classify, drive
from expertmesh.errors import NotFinite, Unavailable
from expertmesh.model.sequences import Sequences
from expertmesh.rpc.errors import error_info
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests import tiny
from tests.doubles.tampering import Tampering
from tests.generating import answer_of, answers_of, asked, completed, ids
from tests.small_mesh import SmallMesh, small_mesh

PATIENCE_S = 60
AT_ONCE_S = 3  # on a busy machine
EACH_OF_4 = tuple(f"*:{expert}" for expert in range(4))
TEXTS = ["oil", "water on a planet", *tiny.SENTENCES, "match", "b", "g", "m"]  # the last three want no expert 0
DEAD = 0


def missing_of(message: Any) -> list[tuple[int, int]]:
    return [(one.layer, one.expert) for one in message.missing_experts]


async def until_route(mesh: SmallMesh, route: pb.Route) -> None:
    """Waits until requests go a way."""
    async with asyncio.timeout(5):
        while (await classified(mesh, TEXTS[:1], pb.CONTRACT_DEGRADED_OK))[0].route != route:
            await asyncio.sleep(0.01)


async def classified(mesh: SmallMesh, texts: Sequence[str], contract: pb.Contract) -> Sequence[pb.Classification]:
    return (await mesh.client.classify(texts, contract=contract, include_experts=True)).results


def bits(result: pb.Classification) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(result.logits), tuple(result.probabilities)


def without_expert(text: str, dead: int) -> Scores:
    """What the one loop gives where a model's experts of one number are left out."""
    stage = tiny.stage("full_model", tiny.model())
    whole = stage.loader.full_model()
    tokenizer = load_classifier_tokenizer(stage.loader.folder, stage.loader.manifest)
    encoded = tokenizer.encode([text], stage.spec.context)
    sequences = Sequences(torch.from_numpy(encoded.lengths_B))

    def answer(call: StageCall) -> Any:
        given = {name: torch.from_numpy(value.copy()) for name, value in vars(call).items() if is_array(value)}
        result = whole._answer(type(call)(**{**vars(call), **given, **kept(call)}), sequences)
        match call, result:
            case ApplyExperts(), _:
                rows_ND = result.rows_ND.numpy().copy()
                start = int(call.counts_E[:dead].sum())
                rows_ND[start : start + int(call.counts_E[dead])] = np.nan
                return Applied(rows_ND, missing=[dead] if call.counts_E[dead] else [])
            case _, Gated():
                return Gated(*(one.numpy() for one in list(vars(result).values())[:4]))
            case _, Scores():
                return Scores(result.logits_BC.numpy(), result.probabilities_BC.numpy())
        return result.numpy()

    with torch.inference_mode():
        ids_T = encoded.ids_T.astype(np.int64)
        return drive(classify(stage.spec, ids_T, encoded.lengths_B), answer)


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def kept(call: StageCall) -> dict[str, Any]:
    return {"counts_E": call.counts_E} if isinstance(call, ApplyExperts) else {}


async def test_texts_without_a_dead_expert_say_so_and_the_others_are_exact() -> None:
    async with small_mesh(tiny.model(), full_model=False, experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        whole = await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        assert all(one.route == pb.ROUTE_MESH and one.exact and not one.missing_experts for one in whole)
        await mesh.switches[f"expert-{DEAD}"].off()

        degraded = await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        for text, before, after in zip(TEXTS, whole, degraded, strict=True):
            counts_LE = wire.decode(before.expert_tokens, wire.INT32, (None, None), "expert_tokens").copy()
            assert missing_of(after) == [(layer, DEAD) for layer in missing_layers(after)]
            counts_LE_after = wire.decode(after.expert_tokens, wire.INT32, (None, None), "expert_tokens")
            assert not counts_LE_after[:, DEAD].any()
            if not counts_LE[:, DEAD].any():
                assert (after.route, after.exact, bits(after)) == (pb.ROUTE_MESH, True, bits(before))
                continue
            assert (after.route, after.exact) == (pb.ROUTE_DEGRADED, False)
            assert np.flatnonzero(counts_LE[:, DEAD])[0] == missing_layers(after)[0]  # behind it, routes may differ
            assert bits(after) != bits(before)
            assert bits(after) == tuple(tuple(one[0].tolist()) for one in vars(without_expert(text, DEAD)).values())
        assert {one.route for one in degraded} == {pb.ROUTE_MESH, pb.ROUTE_DEGRADED}

        for text, together in zip(TEXTS, degraded, strict=True):  # whatever shares the pass
            (alone,) = await classified(mesh, [text], pb.CONTRACT_DEGRADED_OK)
            assert (bits(alone), alone.route) == (bits(together), together.route)

        exact = asyncio.gather(
            *(classified(mesh, [text], pb.CONTRACT_EXACT) for text in TEXTS),
            *(classified(mesh, [text], pb.CONTRACT_DEGRADED_OK) for text in TEXTS),
            return_exceptions=True,
        )
        outcomes = await exact
        assert all(isinstance(one, Unavailable) for one in outcomes[: len(TEXTS)])
        assert [bits(one[0]) for one in outcomes[len(TEXTS) :]] == [bits(one) for one in degraded]  # type: ignore[index]

        await mesh.switches[f"expert-{DEAD}"].on()
        await until_route(mesh, pb.ROUTE_MESH)
        again = await classified(mesh, TEXTS, pb.CONTRACT_MESH_ONLY)
        assert [bits(one) for one in again] == [bits(one) for one in whole]


def missing_layers(result: pb.Classification) -> list[int]:
    return [one.layer for one in result.missing_experts]


@pytest.mark.parametrize("contract", [pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY])
async def test_without_an_expert_and_a_full_model_the_error_names_the_expert_at_once(contract: pb.Contract) -> None:
    async with small_mesh(tiny.model(), full_model=False, experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        await mesh.switches["expert-1"].off()
        started_s = time.monotonic()
        async with grpc.aio.insecure_channel(mesh.address) as channel:
            request = pb.ClassifyRequest(texts=TEXTS, contract=contract)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await InferenceServiceStub(channel).Classify(request, timeout=20)
        assert time.monotonic() - started_s < AT_ONCE_S
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        info = error_info(refused.value)
        assert (info["stage"], info["expert"], info["layer"] in "01") == ("expert-1", "1", True)
        assert b"RetryInfo" in dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
        assert "full" not in refused.value.details()


async def test_a_stage_that_is_dead_is_no_expert_to_do_without() -> None:
    async with small_mesh(tiny.model(), full_model=False) as mesh, asyncio.timeout(PATIENCE_S):
        await mesh.switches["classifier"].off()
        with pytest.raises(Unavailable) as unavailable:
            await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        assert unavailable.value.stage == "classifier"


async def test_the_full_model_comes_before_an_answer_without_an_expert() -> None:
    async with small_mesh(tiny.model(), experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        whole = await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        await mesh.switches[f"expert-{DEAD}"].off()
        results = await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        assert {one.route for one in results} == {pb.ROUTE_FULL_MODEL}
        assert [bits(one) for one in results] == [bits(one) for one in whole]
        await mesh.switches["full_model"].off()
        assert pb.ROUTE_DEGRADED in {one.route for one in await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)}
        with pytest.raises(Unavailable) as unavailable:
            await classified(mesh, TEXTS, pb.CONTRACT_EXACT)
        assert unavailable.value.expert == DEAD


# Streams.

PROMPTS = [asked(3, 24), asked(40, 24, temperature=1.2, seed=4), asked(130, 24, temperature=1.1, seed=6, n=2)]
GROUPS = ("*:0,*:1,*:2", "*:3", "*:4,*:5,*:6,*:7")


def under(contract: pb.Contract, request: pb.GenerateRequest) -> pb.GenerateRequest:
    changed = pb.GenerateRequest()
    changed.CopyFrom(request)
    changed.contract = contract
    return changed


class Slow(Tampering):
    """An expert service that lets streams be met in the middle."""

    def __init__(self, honest: Any) -> None:
        async def wait(reply: Any, context: Any) -> Any:
            await asyncio.sleep(0.002)
            return reply

        super().__init__(honest, "Apply", wait)


async def met(mesh: SmallMesh, contract: pb.Contract, happens: Any) -> list[Any]:
    """What becomes of streams of all prompts under which something happens: their messages, or their errors."""
    given: list[list[pb.GenerateResponse]] = [[] for _ in PROMPTS]

    async def read(number: int) -> None:
        async with aclosing(mesh.client.generate(under(contract, PROMPTS[number]))) as messages:
            async for message in messages:
                given[number].append(message)

    tasks = [asyncio.create_task(read(number)) for number in range(len(PROMPTS))]
    while not all(len(one) >= 6 for one in given):
        await asyncio.sleep(0.001)
        assert not any(task.done() for task in tasks)
    started_s = time.monotonic()
    await happens()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    if all(isinstance(end, Exception) for end in ends):
        assert time.monotonic() - started_s < AT_ONCE_S
    return [end or one for end, one in zip(ends, given, strict=True)]


async def test_streams_go_on_without_a_dead_expert_and_say_so_from_there_on() -> None:
    wraps = {"expert": Slow}
    async with small_mesh(full_model=False, experts=GROUPS, wraps=wraps) as mesh, asyncio.timeout(PATIENCE_S):
        whole = await completed(mesh.client, PROMPTS)
        streams = await met(mesh, pb.CONTRACT_DEGRADED_OK, mesh.switches["expert-1"].off)
        for request, messages, before in zip(PROMPTS, streams, whole, strict=True):
            assert isinstance(messages, list), messages
            for choice in range(request.n or 1):
                mine = [message for message in messages if message.choice == choice and message.tokens]
                assert len(mine) == request.max_tokens
                degraded = [message.route == pb.ROUTE_DEGRADED for message in mine]
                first = degraded.index(True)
                assert first > 0
                assert degraded == [False] * first + [True] * (len(mine) - first)
                assert all(message.exact != flag for message, flag in zip(mine, degraded, strict=True))
                assert {expert for message in mine[first:] for _, expert in missing_of(message)} == {3}
                assert not any(message.missing_experts for message in mine[:first])
                drawn = [token.id for message in mine for token in message.tokens]
                assert tuple(drawn[:first]) == before[choice].tokens[:first]
                if not request.n:  # what another that goes on from there is given
                    known = drawn[:first]
                    resumed = pb.GenerateRequest()
                    resumed.CopyFrom(under(pb.CONTRACT_DEGRADED_OK, request))
                    resumed.ids.ids.extend(known)
                    resumed.max_tokens -= len(known)
                    reply = await mesh.client.complete(resumed)
                    assert answers_of(reply)[0].tokens == tuple(drawn[first:])
                    assert reply.choices[0].route == pb.ROUTE_DEGRADED
                    assert not reply.choices[0].exact
                    assert {expert for _, expert in missing_of(reply.choices[0])} == {3}
        for contract in (pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY):
            with pytest.raises(Unavailable):
                await mesh.client.complete(under(contract, PROMPTS[0]))
        await mesh.switches["expert-1"].on()

        async def is_whole() -> bool:
            return (await mesh.client.complete(under(pb.CONTRACT_DEGRADED_OK, asked(3, 1)))).choices[0].exact

        async with asyncio.timeout(5):
            while not await is_whole():
                await asyncio.sleep(0.01)
        assert await completed(mesh.client, PROMPTS) == whole
        free, blocks = mesh.free_blocks
        async with asyncio.timeout(5):
            while free != blocks:
                await asyncio.sleep(0.01)
                free, blocks = mesh.free_blocks


@pytest.mark.parametrize("contract", [pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY])
async def test_streams_that_may_not_do_without_end_at_once(contract: pb.Contract) -> None:
    wraps = {"expert": Slow}
    async with small_mesh(full_model=False, experts=GROUPS, wraps=wraps) as mesh, asyncio.timeout(PATIENCE_S):
        for error in await met(mesh, contract, mesh.switches["expert-1"].off):
            assert isinstance(error, Unavailable)
            assert (error.stage, error.expert, error.layer in (0, 1, 2)) == ("expert-1", 3, True)


async def test_a_stream_goes_back_to_the_mesh_where_the_full_model_ends_under_it() -> None:
    wraps = {"expert": Slow}
    async with small_mesh(experts=GROUPS, wraps=wraps) as mesh, asyncio.timeout(PATIENCE_S):
        whole = await completed(mesh.client, PROMPTS)
        switches = mesh.switches

        async def happens() -> None:
            await switches["expert-1"].off()
            await switches["expert-1"].on()
            async with asyncio.timeout(5):
                while (await mesh.client.complete(asked(3, 1))).choices[0].route != pb.ROUTE_MESH:
                    await asyncio.sleep(0.01)
            await switches["full_model"].off()

        streams = await met(mesh, pb.CONTRACT_EXACT, happens)
    for request, messages, before in zip(PROMPTS, streams, whole, strict=True):
        assert isinstance(messages, list), messages
        assert [answer_of(messages, choice) for choice in range(request.n or 1)] == before
        assert all(message.exact for message in messages)
        assert pb.ROUTE_FULL_MODEL in {message.route for message in messages}


async def test_a_stream_that_is_too_long_to_be_computed_anew_goes_to_the_full_model_if_it_may() -> None:
    async def lose(reply: Any, context: Any) -> Any:
        raise Unavailable("gone", "gating")

    losing: list[Tampering] = []

    def wrap(honest: Any) -> Tampering:
        losing.append(Tampering(honest, "Gate", lose))
        losing[0].times = 0
        return losing[0]

    wraps = {"expert": Slow, "gating": wrap}
    request = asked(40, 24)
    async with small_mesh(wraps=wraps, rebuild_tokens=40) as mesh, asyncio.timeout(PATIENCE_S):
        whole = answers_of(await mesh.client.complete(request))
        for contract in (pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY):
            stream = mesh.client.generate(under(contract, request))
            messages = [await anext(stream) for _ in range(3)]
            losing[0].times = 1
            if contract == pb.CONTRACT_MESH_ONLY:
                with pytest.raises(Unavailable, match="computed anew; that is done for at most 40"):
                    _ = [message async for message in stream]
                continue
            messages += [message async for message in stream]
            assert [answer_of(messages)] == whole
            assert {message.route for message in messages} == {pb.ROUTE_MESH, pb.ROUTE_FULL_MODEL}
            async with asyncio.timeout(5):
                while (await mesh.client.complete(asked(3, 1))).choices[0].route != pb.ROUTE_MESH:
                    await asyncio.sleep(0.01)


# Numbers that are not finite.


class Broken(Tampering):
    """An expert service of which nothing finite comes."""

    def __init__(self, honest: Any) -> None:
        async def spoil(reply: Any, context: Any) -> Any:
            rows = wire.decode_rows(reply.rows, tuple(reply.rows.shape), "rows").copy()
            rows[-1, 0] = np.nan
            reply.rows.CopyFrom(wire.encode(rows))
            return reply

        super().__init__(honest, "Apply", spoil)


async def test_a_broken_expert_is_refused_and_texts_go_to_the_full_model() -> None:
    wraps = {"expert-1": Broken}
    async with small_mesh(tiny.model(), wraps, experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        wanted = (await mesh.client.classify(TEXTS, route=pb.ROUTE_FULL_MODEL)).results
        results = await asyncio.gather(*(classified(mesh, [text], pb.CONTRACT_EXACT) for text in TEXTS))
        assert [bits(one) for (one,) in results] == [bits(one) for one in wanted]
        assert pb.ROUTE_FULL_MODEL in {one.route for (one,) in results}
        with pytest.raises(Unavailable) as unavailable:
            await classified(mesh, TEXTS, pb.CONTRACT_MESH_ONLY)
        assert (unavailable.value.stage, unavailable.value.expert) == ("expert-1", 1)
        assert "1 refused" in str(unavailable.value)


async def test_a_broken_expert_is_left_out_where_no_full_model_can_tell() -> None:
    wraps = {"expert-1": Broken}
    async with small_mesh(tiny.model(), wraps, False, experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        for contract in (pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY):
            with pytest.raises(Unavailable) as unavailable:
                await classified(mesh, TEXTS, contract)
            assert (unavailable.value.stage, unavailable.value.expert) == ("expert-1", 1)
        results = await classified(mesh, TEXTS, pb.CONTRACT_DEGRADED_OK)
        assert {one.route for one in results} <= {pb.ROUTE_MESH, pb.ROUTE_DEGRADED}
        assert {expert for one in results for _, expert in missing_of(one)} == {1}
        assert np.isfinite([score for one in results for score in one.logits]).all()


async def test_a_stream_goes_on_at_the_full_model_where_an_expert_breaks() -> None:
    async with small_mesh(experts=GROUPS) as mesh:
        whole = await completed(mesh.client, PROMPTS)
    broken = []

    def wrap(honest: Any) -> Broken:
        broken.append(Broken(honest))
        broken[0].times = 0
        return broken[0]

    wraps = {"expert": Slow, "expert-1": wrap}
    async with small_mesh(experts=GROUPS, wraps=wraps) as mesh, asyncio.timeout(PATIENCE_S):

        async def happens() -> None:
            broken[0].times = 10**9

        streams = await met(mesh, pb.CONTRACT_EXACT, happens)
        for request, messages, before in zip(PROMPTS, streams, whole, strict=True):
            assert isinstance(messages, list), messages
            assert [answer_of(messages, choice) for choice in range(request.n or 1)] == before
        with pytest.raises(Unavailable, match="1 refused"):
            await mesh.client.complete(under(pb.CONTRACT_MESH_ONLY, asked(ids(64, 3), 4)))


async def test_what_the_full_model_finds_not_finite_too_is_the_models_own() -> None:
    async def poisoned(reply: Any, context: Any) -> Any:
        raise NotFinite("the scores are not finite")

    wraps = {"expert-1": Broken, "full_model": lambda honest: Tampering(honest, "Classify", poisoned)}
    async with small_mesh(tiny.model(), wraps, experts=EACH_OF_4) as mesh, asyncio.timeout(PATIENCE_S):
        with pytest.raises(NotFinite):
            await classified(mesh, tiny.SENTENCES, pb.CONTRACT_EXACT)
        with pytest.raises(Unavailable) as unavailable:  # nobody has asked the full model for it
            await classified(mesh, tiny.SENTENCES, pb.CONTRACT_MESH_ONLY)
        assert "refused" not in str(unavailable.value)
