"""One sequence that generates: its tokens, how they are drawn, and who waits for them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from expertmesh.errors import DeadlineExceeded, InvalidInput
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.passes import PROFILE_SEPARATOR, Provenance, are_exact
from expertmesh.v1.classifier_pb2 import Draw
from expertmesh.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    Route,
)
from expertmesh.v1.sampling_pb2 import Sampling, TokenLogprobs

ID_BYTES = 16
NO_LOGPROBS = -1


@dataclass(frozen=True)
class Wish:
    """What is asked of one sequence.

    Attributes:
        prompt: Token ids to go on from.
        sampling: How tokens are drawn.
        choice: Which of the answers to the prompt this is; part of the key of its random numbers.
        max_tokens: Most tokens to generate; prompt and answer fit the context together.
        end_ids: Tokens that end it.
        logprobs: How many likely tokens to tell at each place; -1: no log probability at all.
        deadline: When the answer is of no use any more.
        arrived_s: When the request came, on the clock of `time.monotonic`.
    """

    prompt: Sequence[int]
    sampling: Sampling
    choice: int
    max_tokens: int
    end_ids: frozenset[int]
    logprobs: int
    deadline: Deadline
    arrived_s: float = field(default_factory=lambda: time.monotonic())


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        drawn: Its id and log probabilities.
        finish: Why it is the last one, if it is.
        provenance: How it was computed.
        at_s: When it was there, on the clock of `time.monotonic`.
    """

    drawn: TokenLogprobs
    finish: FinishReason
    provenance: Provenance
    at_s: float = field(default_factory=lambda: time.monotonic())


class Witnesses:
    """How everything was computed that a token depends on: its own step, and those that filled the cache."""

    def __init__(self) -> None:
        self._profiles: set[str] = set()
        self._missing: set[tuple[int, int]] = set()
        self._all_exact = True
        self._known: Provenance | None = None  # the latest that was added, which adds nothing when it comes again
        self._route: Route | None = None
        self._said: Provenance | None = None

    def add(self, provenance: Provenance) -> None:
        """Takes down one more step."""
        if provenance == self._known:
            return
        self._known, self._said = provenance, None
        self._profiles.update(provenance.profile.split(PROFILE_SEPARATOR))
        self._missing.update(provenance.missing)
        self._all_exact &= provenance.exact

    def provenance(self, route: Route) -> Provenance:
        """What may be said of a token that came this way."""
        if self._said is None or self._route != route:
            self._route = route
            profile = PROFILE_SEPARATOR.join(sorted(self._profiles))
            exact = self._all_exact and are_exact(self._profiles)
            self._said = Provenance(route, exact, profile).without(self._missing)
        return self._said


@dataclass(eq=False)
class Generation:
    """The state of one sequence.

    Attributes:
        wish: What is asked.
        known: What was generated of it elsewhere.
        ids: Prompt and what was generated so far.
        cached: How many of these are in the KV cache of its home.
        epoch: Grows each time it has to be computed anew.
        id: Names it to gating; nobody can guess it.
        left: Whether nobody waits for it any more.
        rebuilds: How often it had to be computed anew.
        losses: How often because its cache was lost, and not because it was moved.
        heard_s: When its home last heard of it, on the clock of `time.monotonic`.
        opened_s: When a home took it, on the same clock.
        first_s: When its first token came.
        latest_s: When its latest token came; 0 until one has come here since it was last computed anew.
        stepped: Number of the last step at its home that it had a part in.
        witnesses: How everything was computed that its next token depends on.
    """

    wish: Wish
    known: Sequence[int] = ()
    ids: list[int] = field(init=False)
    cached: int = 0
    epoch: int = 0
    id: bytes = field(default_factory=lambda: Generation.new_id())
    left: bool = False
    rebuilds: int = 0
    losses: int = 0
    heard_s: float = 0.0
    opened_s: float = 0.0
    first_s: float = 0.0
    latest_s: float = 0.0
    stepped: int = 0
    witnesses: Witnesses = field(default_factory=lambda: Witnesses())
    _seen: set[int] = field(default_factory=set)
    _events: asyncio.Queue[Token | BaseException] = field(default_factory=asyncio.Queue)
    _is_late: bool = False

    def __post_init__(self) -> None:
        self.ids = [*self.wish.prompt, *self.known]
        if self.wish.sampling.repetition_penalty != 1.0:
            self._seen = set(self.ids)

    @staticmethod
    def new_id() -> bytes:
        """A name that nobody can guess."""
        return secrets.token_bytes(ID_BYTES)

    @property
    def most_tokens(self) -> int:
        """Tokens that it will have at most, which is what its home reserves; the last one is never cached."""
        return len(self.wish.prompt) + self.wish.max_tokens - 1

    @property
    def missing(self) -> int:
        """Tokens that have to go through the layers before the next one can be drawn."""
        return len(self.ids) - self.cached

    def draw(self) -> Draw:
        """How its next token is drawn."""
        return Draw(
            sampling=self.wish.sampling,
            choice=self.wish.choice,
            position=len(self.ids),
            seen=list(self._seen),
            logprobs=self.wish.logprobs,
        )

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - len(self.wish.prompt)

    def restart(self, is_loss: bool = True) -> None:
        """What was cached of it is lost, or left behind in good order: it has to be computed anew from its tokens."""
        self.cached = 0
        self.epoch += 1
        self.rebuilds += 1
        self.losses += is_loss
        self.latest_s = 0.0
        if not self.generated:  # tokens that were drawn depend on who computed them, whatever is computed anew
            self.witnesses = Witnesses()

    def add(self, drawn: TokenLogprobs, route: Route) -> bool:
        """Takes the next token and passes it on; gives whether it was the last one."""
        first = not self.generated
        self.ids.append(drawn.id)
        if self._seen:
            self._seen.add(drawn.id)
        self.latest_s = now_s = time.monotonic()
        if first:
            self.first_s = now_s
        finish = FINISH_REASON_UNSPECIFIED
        if drawn.id in self.wish.end_ids:
            finish = FINISH_REASON_STOP
        elif self.generated >= self.wish.max_tokens:
            finish = FINISH_REASON_LENGTH
        self._events.put_nowait(Token(drawn, finish, self.witnesses.provenance(route), now_s))
        return finish != FINISH_REASON_UNSPECIFIED

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        self._events.put_nowait(error)

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Its tokens as they come.

        Raises:
            DeadlineExceeded: It was not done in time.
            MeshError: It failed.
        """
        timer = None
        try:
            timer = asyncio.get_running_loop().call_later(self.wish.deadline.remaining_s(), self._expire)
            while True:
                event = await self._events.get()
                if self._is_late:
                    raise DeadlineExceeded("the deadline has passed")
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.finish != FINISH_REASON_UNSPECIFIED:
                    return
        finally:
            self.left = True
            if timer is not None:
                timer.cancel()

    def _expire(self) -> None:
        self._is_late = True
        self.fail(DeadlineExceeded("the deadline has passed"))


def check_fits(prompt_tokens: int, max_tokens: int, context: int) -> int:
    """The number of tokens that may be generated behind a prompt.

    Args:
        prompt_tokens: Tokens of the prompt.
        max_tokens: What the caller asks for; 0 for as many as there is room for.
        context: Most tokens of a sequence.

    Raises:
        InvalidInput: The prompt leaves no room.
    """
    if prompt_tokens >= context:
        raise InvalidInput(f"the prompt has {prompt_tokens} tokens; with an answer at most {context} fit", "prompt")
    return min(max_tokens or context, context - prompt_tokens)
