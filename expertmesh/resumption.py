"""Going on with a stream of generated tokens elsewhere, after the gateway that it came from was lost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from expertmesh.errors import Unavailable
from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse


@dataclass
class _Choice:
    """What a choice has given, and how much of that the stream under way has given again."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    is_finished: bool = False
    ids_again: int = 0
    characters_again: int = 0


class Resumption:
    """What the streams of one request have given.

    The same seed gives the same tokens, so a stream that broke is asked for once more, with the seed that the first
    one told, and what was given before is left out.

    Args:
        request: What is asked for.

    Attributes:
        request: What is to be asked for next.
        has_begun: Whether anything was given.
        is_exact: Whether all that was given can be had again, bit by bit.
        is_complete: Whether everything was given.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.has_begun = False
        self.is_exact = True
        self.is_complete = False
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)

    def begin_again(self) -> None:
        """Is called before the request is made once more."""
        for choice in self._choices.values():
            choice.ids_again = choice.characters_again = 0

    def new_part(self, message: GenerateResponse) -> GenerateResponse | None:
        """Gives what a message adds to all that was given; None if it adds nothing.

        Raises:
            Unavailable: It does not go on from that: the answer came out differently.
        """
        if not self.has_begun:
            self.has_begun = True
            asked, self.request = self.request, GenerateRequest(seed=message.seed)
            self.request.MergeFrom(asked)
        self.is_exact &= message.exact
        self.is_complete = message.HasField("usage")
        choice = self._choices[message.choice]
        old_ids = choice.ids[choice.ids_again : choice.ids_again + len(message.tokens)]
        old_text = choice.text[choice.characters_again : choice.characters_again + len(message.text)]
        ids = [token.id for token in message.tokens]
        if ids[: len(old_ids)] != old_ids or not message.text.startswith(old_text):
            raise Unavailable("a gateway was lost, and what was generated again came out differently", "the gateway")
        choice.ids_again += len(ids)
        choice.characters_again += len(message.text)
        choice.ids += ids[len(old_ids) :]
        choice.text += message.text[len(old_text) :]
        was_finished, choice.is_finished = choice.is_finished, choice.is_finished or message.finish_reason != 0
        if not (old_ids or old_text or was_finished):
            return message
        part = GenerateResponse()
        part.CopyFrom(message)
        del part.tokens[: len(old_ids)]
        part.text = message.text[len(old_text) :]
        if was_finished:
            part.ClearField("finish_reason")
        return part if part.tokens or part.text or part.finish_reason or self.is_complete else None
