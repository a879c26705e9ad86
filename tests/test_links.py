"""Links over both carriers: a call over one means what a call by itself means."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc import request_id
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.guard import Guard
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.link.context import is_alone
from expertmesh.rpc.link.frames import checksum
from expertmesh.rpc.link.servicer import IDLE_S, LinkServicer
from expertmesh.rpc.link.socket import SocketConnection, listening
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse
from expertmesh.v1.link_pb2_grpc import LinkServiceStub
from expertmesh.v1.tensor_pb2 import Tensor
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from tests import tiny

DIRECT, AT_ONCE = "unix, methods that give futures", "unix, methods whose futures are done"
CARRIERS = ("unix", "tcp", DIRECT, AT_ONCE)
MOST_BYTES = 2**20
PREFIX = "<IIQ"  # of a frame: bytes of head and message, and their checksum


class Echo(EmbeddingServiceServicer):
    """Answers with the bytes it was given, after what a test asks for in the tensor's first size."""

    HANG, RAISE, BUG = 7, 8, 9

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        self.error: BaseException = InvalidInput("it is bad", "ids")
        self.request_ids: list[str] = []
        self.remaining_s = 0.0

    async def Embed(self, request: EmbedRequest, context: Any) -> EmbedResponse:
        self.request_ids.append(request_id.current())
        self.remaining_s = context.time_remaining()
        self.arrived.set()
        what = request.ids.shape[0] if request.ids.shape else 0
        if what == self.HANG:
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if what == self.RAISE:
            raise self.error
        if what == self.BUG:
            raise RuntimeError("secret")
        return EmbedResponse(rows=request.ids)


class DirectEcho(Echo):
    """The same as a method that is no coroutine but gives a future."""

    def Embed(self, request: EmbedRequest, context: Any) -> asyncio.Future[EmbedResponse]:  # type: ignore[override]
        if request.ids.shape == [self.RAISE]:
            raise self.error
        return asyncio.ensure_future(super().Embed(request, context))


class AtOnceEcho(Echo):
    """The same where a call that need not wait is answered before the method returns; tells who came alone."""

    def __init__(self) -> None:
        super().__init__()
        self.came_alone: list[bool] = []
        self.computes_s = 0.0

    def Embed(self, request: EmbedRequest, context: Any) -> asyncio.Future[EmbedResponse]:  # type: ignore[override]
        self.came_alone.append(is_alone(context))
        time.sleep(self.computes_s)  # in the event loop, as stages compute
        coroutine = super().Embed(request, context)
        if request.ids.shape == [self.HANG]:
            return asyncio.ensure_future(coroutine)
        future = asyncio.get_running_loop().create_future()
        try:
            coroutine.send(None)
        except StopIteration as stop:
            future.set_result(stop.value)
        except BaseException as error:
            future.set_exception(error)
        return future


ECHOES: dict[str, type[Echo]] = {DIRECT: DirectEcho, AT_ONCE: AtOnceEcho}


class Ends:
    """Both ends of a link."""

    def __init__(self, echo: Echo, link: LinkChannel, servicer: LinkServicer, server: grpc.aio.Server) -> None:
        self.echo, self.link, self.servicer, self.server = echo, link, servicer, server
        self.stub: Any = EmbeddingServiceStub(link)  # type: ignore[arg-type]

    async def ask(self, data: bytes = b"", what: int = 0, timeout_s: float = 5.0) -> bytes:
        request = EmbedRequest(ids=Tensor(shape=[what] if what else [], data=data))
        reply = await self.stub.Embed(request, timeout_s)
        return bytes(reply.rows.data)


@asynccontextmanager
async def linked(carrier: str, max_message_bytes: int = MOST_BYTES) -> AsyncIterator[Ends]:
    echo, guard = ECHOES.get(carrier, Echo)(), Guard()
    servicer = LinkServicer(guard, max_message_bytes=max_message_bytes)
    servicer.description = DescribeResponse(kind="embedding", model_digest="digest", profile="cpu")
    add_EmbeddingServiceServicer_to_server(echo, servicer)  # type: ignore[arg-type]
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", max_message_bytes)))
    servicer.add_to_server(server)
    listen = "127.0.0.1:0" if carrier == "tcp" else f"unix:{tiny.scratch()}/e.sock"
    port = server.add_insecure_port(listen)
    address = f"127.0.0.1:{port}" if carrier == "tcp" else listen
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(server.stop, None)
        await stack.enter_async_context(servicer.listening(listen))
        channel = await stack.enter_async_context(open_channel(address, max_message_bytes))
        link = LinkChannel(address, channel, "embedding", max_message_bytes=max_message_bytes)
        stack.push_async_callback(link.close)
        await link.open(5)
        yield Ends(echo, link, servicer, server)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_replies_go_to_whoever_asked_whatever_their_sizes(carrier: str) -> None:
    generator = random.Random(1)
    sizes = [0, 1, 7, 1000, 2**16 - 1, 2**17, 2**17 + 1, 400_000, 900_000]
    texts = [generator.randbytes(generator.choice(sizes)) for _ in range(60)]
    async with linked(carrier) as ends:
        assert await asyncio.gather(*(ends.ask(text) for text in texts)) == texts


async def test_a_call_comes_alone_if_nothing_is_behind_it_and_other_links_are_quiet() -> None:
    async with linked(AT_ONCE) as ends:
        echo: Any = ends.echo
        await ends.ask(b"one")
        await asyncio.gather(*(ends.ask(b"some", timeout_s=5) for _ in range(3)))
        assert echo.came_alone == [True, False, False, True]
        address = f"unix:{ends.link._address.removeprefix('unix:')}"
        async with open_channel(address, MOST_BYTES) as channel:
            other = LinkChannel(address, channel, "embedding")
            await other.open(5)
            await ends.ask(b"beside a link that brings nothing")
            await EmbeddingServiceStub(other).Embed(EmbedRequest(), 5)  # type: ignore[arg-type, call-arg]
            await ends.ask(b"beside one that has just brought something")
            assert echo.came_alone[4:] == [True, False, False]
            while not echo.came_alone[-1]:
                await ends.ask(b"until it has been quiet for a while")
            await other.close()
    assert not is_alone(None)


async def test_calls_of_several_links_that_come_while_one_is_computed_for_long_are_not_alone() -> None:
    """They could share their work, however long that took."""
    async with linked(AT_ONCE) as ends, open_channel(ends.link._address, MOST_BYTES) as channel:
        echo: Any = ends.echo
        echo.computes_s = 1.5 * IDLE_S
        others = [LinkChannel(ends.link._address, channel, "embedding") for _ in range(2)]
        for other in others:
            await other.open(5)
        asked = [ends.ask(), *(EmbeddingServiceStub(other).Embed(EmbedRequest(), 5) for other in others)]  # type: ignore[arg-type, call-arg]
        await asyncio.gather(*asked)
        assert echo.came_alone == [True, False, False]
        for other in others:
            await other.close()


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_it_is_told_once_who_answers(carrier: str) -> None:
    async with linked(carrier) as ends:
        assert (ends.link.origin.model_digest, ends.link.origin.profile) == ("digest", "cpu")


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_an_error_arrives_with_its_details_and_a_bug_without_its_text(carrier: str) -> None:
    async with linked(carrier) as ends:
        with pytest.raises(InvalidInput, match="it is bad") as bad:
            await ends.ask(what=Echo.RAISE)
        assert bad.value.field == "ids"
        ends.echo.error = Unavailable("gone", "expert-3", 1, 3)
        with pytest.raises(Unavailable) as gone:
            await ends.ask(what=Echo.RAISE)
        assert (gone.value.stage, gone.value.layer, gone.value.expert) == ("expert-3", 1, 3)
        with pytest.raises(CorruptReply) as bug:
            await ends.ask(what=Echo.BUG)
        assert "secret" not in str(bug.value)
        assert await ends.ask(b"on") == b"on"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_deadline_ends_the_call_at_both_ends(carrier: str) -> None:
    async with linked(carrier) as ends:
        with pytest.raises(DeadlineExceeded):
            await ends.ask(what=Echo.HANG, timeout_s=0.1)
        await asyncio.wait_for(ends.echo.cancelled.wait(), 5)
        assert 0 < ends.echo.remaining_s <= 0.1
        assert await ends.ask(b"on") == b"on"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_caller_who_leaves_cancels_the_call(carrier: str) -> None:
    async with linked(carrier) as ends:
        call = asyncio.create_task(ends.ask(what=Echo.HANG))
        await ends.echo.arrived.wait()
        call.cancel()
        await asyncio.wait_for(ends.echo.cancelled.wait(), 5)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_calls_that_are_cancelled_before_they_begin_leave_nothing_behind(carrier: str) -> None:
    async with linked(carrier) as ends:
        for _ in range(3):
            call = ends.ask(what=Echo.HANG)
            call.send(None)  # the call and its end are sent in one breath
            with pytest.raises(asyncio.CancelledError):
                call.throw(asyncio.CancelledError())
        assert await ends.ask(b"on") == b"on"
        ends.servicer.drain()
        await asyncio.wait_for(ends.link.ended.wait(), 5)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_method_that_cancels_itself_is_answered(carrier: str) -> None:
    async with linked(carrier) as ends:
        ends.echo.error = asyncio.CancelledError()
        with pytest.raises(Unavailable):
            await ends.ask(what=Echo.RAISE)
        assert await ends.ask(b"on") == b"on"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_the_request_id_travels_with_each_call(carrier: str) -> None:
    async def ask(ends: Ends, name: str) -> None:
        request_id.take_over(name)
        await ends.ask()

    async with linked(carrier) as ends:
        await asyncio.gather(*(asyncio.create_task(ask(ends, f"request-{number}")) for number in range(5)))
        assert sorted(ends.echo.request_ids) == [f"request-{number}" for number in range(5)]


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_message_that_is_too_large_fails_alone(carrier: str) -> None:
    async with linked(carrier, 100_000) as ends:
        other = asyncio.create_task(ends.ask(b"other", Echo.HANG))
        await ends.echo.arrived.wait()
        with pytest.raises(Overloaded):
            await ends.ask(bytes(100_000))
        ends.echo.go_on.set()
        assert await other == b"other"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_method_that_is_not_offered_is_refused(carrier: str) -> None:
    async with linked(carrier) as ends:
        stub: Any = TokenizerServiceStub(ends.link)  # type: ignore[arg-type]
        with pytest.raises(WrongPart, match="does not offer"):
            await stub.Encode(EmbedRequest(), 5)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_when_it_ends_all_that_is_under_way_fails_at_once(carrier: str) -> None:
    async with linked(carrier) as ends:
        calls = [asyncio.create_task(ends.ask(what=Echo.HANG)) for _ in range(3)]
        await ends.echo.arrived.wait()
        await ends.link.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        await asyncio.wait_for(ends.echo.cancelled.wait(), 5)
        with pytest.raises(Unavailable):
            await ends.ask()


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_program_that_stops_ends_what_it_has_begun_and_takes_no_more(carrier: str) -> None:
    async with linked(carrier) as ends:
        call = asyncio.create_task(ends.ask(b"begun", Echo.HANG))
        await ends.echo.arrived.wait()
        ends.servicer.drain()
        with pytest.raises(Unavailable):
            await ends.ask()
        ends.echo.go_on.set()
        assert await call == b"begun"
        await asyncio.wait_for(ends.link.ended.wait(), 5)


async def test_a_reply_that_is_on_its_way_arrives_though_its_sender_stops_and_is_written_to() -> None:
    async with linked("unix") as ends:
        call = asyncio.create_task(ends.ask(b"begun", Echo.HANG))
        await ends.echo.arrived.wait()
        own: Any = ends.link._connection
        own._transport.pause_reading()  # as one that is busy
        ends.servicer.drain()
        ends.echo.go_on.set()
        async with asyncio.timeout(5):
            while any(calls._under_way for calls in ends.servicer._links):
                await asyncio.sleep(0)
        late = asyncio.create_task(ends.ask(b"late"))
        await asyncio.sleep(0)
        own._transport.resume_reading()
        assert await call == b"begun"
        with pytest.raises(Unavailable):
            await late
        await asyncio.wait_for(ends.servicer.ended(5), 1)


async def test_nobody_there_is_told_as_such_and_a_link_may_be_opened_again() -> None:
    async with linked("unix") as ends:
        address = "unix:/nowhere/at/all.sock"
        async with open_channel(address) as channel:
            with pytest.raises(Unavailable):
                await LinkChannel(address, channel, "embedding").open(1)
        await ends.link.close()
        await ends.link.open(5)
        assert await ends.ask(b"again") == b"again"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_link_that_is_opened_once_more_keeps_what_is_under_way(carrier: str) -> None:
    async with linked(carrier) as ends:
        call = asyncio.create_task(ends.ask(b"begun", Echo.HANG))
        await ends.echo.arrived.wait()
        await ends.link.open(5)
        ends.echo.go_on.set()
        assert await call == b"begun"
        assert await ends.ask(b"on") == b"on"


def frame(head: Any, message: bytes = b"") -> bytes:
    data = head.SerializeToString()
    return struct.pack(PREFIX, len(data), len(message), checksum(data, message)) + data + message


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=8), st.data())
def test_frames_are_found_however_they_are_cut(messages: list[bytes], data: st.DataObject) -> None:
    seen: list[tuple[int, bytes]] = []
    connection = SocketConnection(
        LinkRequest, lambda head, message: seen.append((head.call, bytes(message))), lambda: None, MOST_BYTES
    )
    stream = b"".join(frame(LinkRequest(call=number, method="m"), one) for number, one in enumerate(messages))
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        while cut:
            buffer = connection.get_buffer(-1)
            count = min(cut, len(buffer))
            buffer[:count] = stream[:count]
            connection.buffer_updated(count)
            stream, cut = stream[count:], cut - count
    assert seen == list(enumerate(messages))


@pytest.mark.parametrize(
    "damage",
    [
        struct.pack(PREFIX, 2**17, 0, 0),  # a head that is too large
        struct.pack(PREFIX, 0, MOST_BYTES + 1, 0),  # a message that is too large
        struct.pack(PREFIX, 2, 0, checksum(b"\xff\xff", b"")) + b"\xff\xff",  # no head
        frame(LinkRequest(call=1, method="/expertmesh.v1.EmbeddingService/Embed"), b"\xff")[:-3],  # cut off
    ],
)
async def test_a_peer_that_talks_nonsense_is_cut_off_and_harms_nobody_else(damage: bytes) -> None:
    async with linked("unix") as ends:
        path = ends.link._address.removeprefix("unix:") + ".link"
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(damage)
        writer.write_eof()
        greeting = await asyncio.wait_for(reader.read(), 5)
        assert len(greeting) > 16  # who answers, and nothing else
        writer.close()
        assert await ends.ask(b"on") == b"on"


async def test_a_message_that_is_none_fails_alone_and_a_reply_to_nobody_is_dropped() -> None:
    async with linked("unix") as ends:
        path = ends.link._address.removeprefix("unix:") + ".link"
        responses: asyncio.Queue[LinkResponse] = asyncio.Queue()
        transport, _ = await asyncio.get_running_loop().create_unix_connection(
            lambda: SocketConnection(LinkResponse, lambda head, _: responses.put_nowait(head), lambda: None, 2**20),
            path,
        )
        transport.write(frame(LinkRequest(call=5, method="/expertmesh.v1.EmbeddingService/Embed"), b"\xff"))
        await responses.get()  # who answers
        refused = await asyncio.wait_for(responses.get(), 5)
        assert (refused.call, refused.code) == (5, grpc.StatusCode.INVALID_ARGUMENT.value[0])
        transport.close()


async def test_a_peer_that_does_not_read_is_not_read_either_until_it_does() -> None:
    calls, size = 100, 500_000
    request = EmbedRequest(ids=Tensor(data=bytes(size))).SerializeToString()
    async with linked("unix") as ends:
        path = ends.link._address.removeprefix("unix:") + ".link"
        reader, writer = await asyncio.open_unix_connection(path, limit=1024)
        for number in range(1, calls + 1):
            writer.write(frame(LinkRequest(call=number, method="/expertmesh.v1.EmbeddingService/Embed"), request))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 1)
        assert await ends.ask(b"on") == b"on"
        assert len(ends.echo.request_ids) < calls / 2
        async with asyncio.timeout(30):
            for number in range(calls + 1):  # who answers, and the answers
                head_bytes, message_bytes, _ = struct.unpack(PREFIX, await reader.readexactly(16))
                head = LinkResponse.FromString(await reader.readexactly(head_bytes))
                assert (head.call, head.code) == (number, 0)
                await reader.readexactly(message_bytes)
        writer.close()


async def test_a_peer_that_does_not_read_its_stream_cannot_write_for_ever() -> None:
    request = EmbedRequest(ids=Tensor(data=bytes(500_000))).SerializeToString()
    async with linked("tcp") as ends:
        call = LinkServiceStub(ends.link._channel).Link()

        async def write() -> None:
            for number in range(1, 201):
                method = "/expertmesh.v1.EmbeddingService/Embed"
                head = LinkRequest(call=number, method=method)
                head.checksum = checksum(head.SerializeToString(deterministic=True), request)
                head.message = request
                await call.write(head)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(write(), 2)
        call.cancel()
        assert await ends.ask(b"on") == b"on"
        assert len(ends.echo.request_ids) < 100


async def test_only_its_user_may_connect() -> None:
    path = tiny.scratch() / "l.sock.link"
    async with listening(str(path), lambda: None):  # type: ignore[arg-type,return-value]
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_method_may_end_its_call_by_itself(carrier: str) -> None:
    async def aborts(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not now")

    async with linked(carrier) as ends:
        ends.servicer._path2handler["/expertmesh.v1.EmbeddingService/Embed"] = grpc.unary_unary_rpc_method_handler(
            aborts, EmbedRequest.FromString, EmbedResponse.SerializeToString
        )
        with pytest.raises(Overloaded, match="not now"):
            await ends.ask()
