"""Several streams of answers as one, and several answers at once; what is not wanted any longer is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


async def merged(streams: Sequence[AsyncGenerator[ItemT, None]]) -> AsyncGenerator[tuple[int, ItemT], None]:
    """What the streams give, with their number, in the order in which it comes.

    A stream is at most one item ahead of whoever reads. When one fails, the others are closed; so are all of them when
    this one is.
    """
    if len(streams) == 1:  # nothing to merge, and nothing ahead
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, ItemT] | BaseException | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, stream: AsyncGenerator[ItemT, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((index, item))
        except Exception as error:
            await items.put(error)
        else:
            await items.put(None)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        going = len(tasks)
        while going:
            match await items.get():
                case None:
                    going -= 1
                case BaseException() as error:
                    raise error
                case numbered:
                    yield numbered
    finally:
        await _end(tasks)


async def all_of(answers: Sequence[Coroutine[Any, Any, ItemT]]) -> list[ItemT]:
    """All answers, in the order of their questions; when one fails, the others are cancelled."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
