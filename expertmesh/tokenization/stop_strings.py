"""Finds stop strings in a text that comes in pieces, in time linear in the text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from expertmesh.errors import InvalidInput

MAX_STOPS = 16
MAX_STOP_BYTES = 256


def check_stops(stops: Sequence[str], field: str = "stop") -> None:
    """Refuses too many, empty and too long stop strings.

    Raises:
        InvalidInput: Names the field and says what to do.
    """
    if len(stops) > MAX_STOPS:
        raise InvalidInput(f"{len(stops)} stop strings; at most {MAX_STOPS}", field)
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidInput(f"{field}[{index}] is empty", f"{field}[{index}]")
        if len(stop) > MAX_STOP_BYTES or len(stop.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
            raise InvalidInput(f"{field}[{index}] has more than {MAX_STOP_BYTES} bytes of UTF-8", f"{field}[{index}]")


class StopStrings:
    """Gives a text on, but for what stands at or behind a stop string.

    The match that starts first ends the text, and of those that start there the one that ends first. All strings are
    looked for at once by an automaton (Aho and Corasick, "Efficient string matching", 1975) whose state says how much
    of the text's end could be the beginning of a stop string; just that much is held back.

    Args:
        stops: What to look for; none of them empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self.matched = ""
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str] = [""]
        for stop in stops:
            self._add(stop)
        self._fail = self._links()
        self._state = 0
        self._held = ""
        self._candidate = -1

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append("")
            state = following
        self._found[state] = stop

    def _links(self) -> list[int]:
        """For each state the longest other one that its text ends in; a state knows the longest stop it ends in."""
        fail = [0] * len(self._next)
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                fail[following] = self._step(fail, fail[state], character)
                self._found[following] = self._found[following] or self._found[fail[following]]
                waiting.append(following)
        return fail

    def _step(self, fail: list[int], state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = fail[state]
        return self._next[state].get(character, 0)

    def feed(self, text: str) -> str:
        """Takes the next part of the text; gives what of the whole can be shown now."""
        if self.stopped:
            return ""
        if len(self._next) == 1:
            return text
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            self._state = self._step(self._fail, self._state, character)
            found = self._found[self._state]
            if found and (self._candidate < 0 or end - len(found) < self._candidate):
                self._candidate, self.matched = end - len(found), found
            if 0 <= self._candidate <= end - self._depth[self._state]:
                return self._stop()
        return self._give(len(self._held) - self._depth[self._state])

    def finish(self) -> str:
        """Gives the rest of the text, which is at its end."""
        if self.stopped:
            return ""
        return self._stop() if self._candidate >= 0 else self._give(len(self._held))

    def _stop(self) -> str:
        self.stopped = True
        shown, self._held = self._held[: self._candidate], ""
        return shown

    def _give(self, count: int) -> str:
        count = count if self._candidate < 0 else min(count, self._candidate)
        shown, self._held = self._held[:count], self._held[count:]
        self._candidate -= count if self._candidate >= 0 else 0
        return shown
