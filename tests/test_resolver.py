"""DNS names: what they stand for changes, and every address found is a replica of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from expertmesh.errors import SetupError
from expertmesh.rpc.replicas.resolver import parse_name, resolve
from tests.doubles.embedder import Embedder, ask, known

NAME = "dns:///embedding:50051"


class Zone:
    """What names stand for, as a test changes it."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked: list[tuple[str, int]] = []
        self.error: Exception | None = None

    async def look_up(self, name: str, port: int) -> Sequence[str]:
        self.asked.append((name, port))
        if self.error is not None:
            raise self.error
        return self.addresses


async def test_every_address_behind_a_name_is_a_replica_with_a_link_and_follows_the_name() -> None:
    one, two, three = Embedder(1.0), Embedder(2.0), Embedder(3.0)
    async with one.running("127.0.0.1:0"), two.running("127.0.0.2:0"), three.running("127.0.0.3:0"):
        zone = Zone(one.address, two.address)
        async with known(NAME, look_up=zone.look_up, live=2) as (replicas, events):
            assert zone.asked[0] == ("embedding", 50051)
            assert sorted(replica.address for replica in replicas.live) == sorted(zone.addresses)
            assert all(replica.links for replica in replicas.live)
            assert sorted([await ask(replicas) for _ in range(4)]) == [1.0, 1.0, 2.0, 2.0]
            zone.addresses = (two.address, three.address)
            await events.until(lambda: events.count("live", three.address) == 1)
            await events.until(lambda: events.count("left", one.address) == 1)
            assert sorted([await ask(replicas) for _ in range(4)]) == [2.0, 2.0, 3.0, 3.0]
            assert events.count("lost") == 0


async def test_one_address_of_a_name_is_refused_by_itself() -> None:
    good, stranger = Embedder(1.0), Embedder(2.0, digest=bytes(32))
    async with good.running("127.0.0.1:0"), stranger.running("127.0.0.2:0"):
        zone = Zone(good.address, stranger.address)
        async with known(NAME, look_up=zone.look_up, live=1) as (replicas, events):
            await events.until(lambda: events.count("refused", stranger.address) == 1)
            assert [await ask(replicas) for _ in range(4)] == [1.0] * 4
            assert stranger.calls == 0


async def test_a_name_that_is_not_found_for_a_while_keeps_what_it_had(caplog: pytest.LogCaptureFixture) -> None:
    one = Embedder(1.0)
    async with one.running():
        zone = Zone(one.address)
        async with known(NAME, look_up=zone.look_up) as (replicas, events):
            for error in (socket.gaierror(-3, "try again"), TimeoutError(), None):
                zone.error, zone.addresses, asked = error, (), len(zone.asked)
                async with asyncio.timeout(5):
                    while len(zone.asked) < asked + 3:
                        await asyncio.sleep(0.01)
                assert await ask(replicas) == 1.0
            assert events.count("left") == 0
            told = [record for record in caplog.records if record.getMessage() == "name_not_found"]
            assert len(told) == 1


async def test_an_address_that_becomes_a_name_serves_until_the_name_is_found() -> None:
    one = Embedder(1.0)
    found = asyncio.Event()

    async def slowly(name: str, port: int) -> Sequence[str]:
        await found.wait()
        return [one.address]

    async with one.running(), known(one.address, look_up=slowly) as (replicas, events):
        replicas.set_addresses([NAME])
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert await ask(replicas) == 1.0
        found.set()
        await events.until(lambda: replicas.are_met)
        assert await ask(replicas) == 1.0
        assert events.count("left") == 0


async def test_a_name_is_looked_up_at_once_when_a_replica_is_lost() -> None:
    old, new = Embedder(1.0), Embedder(2.0)
    async with new.running("127.0.0.2:0"):
        async with old.running("127.0.0.1:0"):
            zone = Zone(old.address)
            life = known(NAME, look_up=zone.look_up)
            replicas, events = await life.__aenter__()
            replicas._members._names._every_s = 3600  # from the next look on, it is not the time that makes it look
            asked = len(zone.asked)
            replicas._members.look_up()
            async with asyncio.timeout(5):
                while len(zone.asked) == asked:
                    await asyncio.sleep(0.01)
            zone.addresses = (new.address,)
        await events.until(lambda: events.count("live", new.address) == 1)
        assert await ask(replicas) == 2.0
        await events.until(lambda: events.count("left", old.address) == 1)
        await life.__aexit__(None, None, None)


async def test_a_name_that_is_found_late_is_met_then() -> None:
    one = Embedder(1.0)
    zone = Zone()
    zone.error = socket.gaierror(-2, "not known")
    async with one.running(), known(NAME, look_up=zone.look_up, live=0) as (replicas, events):
        assert not replicas.are_met
        zone.error, zone.addresses = None, (one.address, "127.0.0.9:9")
        await events.until(lambda: events.count("live", one.address) == 1)
        assert replicas.are_met  # any of a name's addresses will do


async def test_names_are_found_as_the_system_finds_them() -> None:
    assert "127.0.0.1:7" in await resolve("localhost", 7) or "[::1]:7" in await resolve("localhost", 7)
    assert await resolve("127.0.0.3", 50051) == ["127.0.0.3:50051"]
    assert await resolve("::1", 50051) == ["[::1]:50051"]
    with pytest.raises(socket.gaierror):
        await resolve("no.such.name.invalid", 1)


@pytest.mark.parametrize(
    "address", ["dns:embedding:1", "dns://server/embedding:1", "dns:///embedding", "dns:///:1", "dns:///a:99999"]
)
def test_what_only_looks_like_a_name_is_refused(address: str) -> None:
    with pytest.raises(SetupError, match="is not dns:///NAME:PORT"):
        parse_name(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "unix:/run/x.sock", "dns-server:1"])
def test_other_addresses_are_no_names(address: str) -> None:
    assert parse_name(address) is None
