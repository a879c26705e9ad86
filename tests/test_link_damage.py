"""What was changed on its way over a link reaches nobody."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import CorruptReply, MeshError
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.link.socket import SocketConnection
from expertmesh.v1.embedding_pb2 import EmbedRequest
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from expertmesh.v1.link_pb2 import LinkRequest
from expertmesh.v1.tensor_pb2 import Tensor
from tests import tiny
from tests.chaos.proxy import HONEST, TO_GATEWAY, TO_REPLICA, Fault, Proxy
from tests.test_links import MOST_BYTES, frame, linked

ROUNDS = 12


@given(st.binary(max_size=200), st.data())
def test_a_frame_with_a_changed_byte_is_never_handed_on(message: bytes, data: st.DataObject) -> None:
    seen: list[bytes] = []
    connection = SocketConnection(
        LinkRequest, lambda head, message: seen.append(bytes(message)), lambda: None, MOST_BYTES
    )
    damaged = bytearray(frame(LinkRequest(call=7, method="/a/B", request_id="c"), message))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    connection.get_buffer(-1)[: len(damaged)] = damaged
    connection.buffer_updated(len(damaged))
    assert seen == []
    assert connection.is_damaged or at < 8  # a length that was changed may mean that more has to come


@pytest.mark.parametrize("direction", [TO_REPLICA, TO_GATEWAY])
@pytest.mark.parametrize("carrier", ["unix", "tcp"])
async def test_a_call_whose_bytes_are_changed_fails_and_the_next_connection_is_good(
    carrier: str, direction: str
) -> None:
    dice = random.Random(1)
    async with linked(carrier) as ends:
        listen = "127.0.0.1:0" if carrier == "tcp" else f"unix:{tiny.scratch()}/p.sock"
        async with Proxy(listen, ends.link._address) as proxy, open_channel(proxy.listen) as channel:
            link = LinkChannel(proxy.listen, channel, "embedding")
            stub = EmbeddingServiceStub(link)  # type: ignore[arg-type]
            errors: list[MeshError] = []
            for seed in range(ROUNDS):
                proxy.fault = HONEST
                await _opened(link)
                text = dice.randbytes(10_000)
                request = EmbedRequest(ids=Tensor(data=text))
                assert (await stub.Embed(request, 5.0)).rows.data == text
                proxy.fault = Fault((direction,), corrupt=1.0, seed=seed)
                try:
                    assert (await stub.Embed(request, 5.0)).rows.data == text  # gRPC has bytes that mean nothing
                except MeshError as error:
                    errors.append(error)
            await link.close()
    assert len(errors) > ROUNDS / 2
    if direction == TO_GATEWAY:
        assert any(isinstance(error, CorruptReply) for error in errors)


async def _opened(link: LinkChannel) -> None:
    """Opens it; the channel below may have to connect anew."""
    async with asyncio.timeout(20):
        while link.ended.is_set():
            try:
                await link.open(5)
            except MeshError:
                await asyncio.sleep(0.01)
