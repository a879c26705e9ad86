"""Draws as they come over the wire, checked, and the tokens that they give."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.errors import InvalidInput
from expertmesh.model import sampling as model
from expertmesh.model.sampling import NO_LOGPROBS, Token
from expertmesh.serving.requests import MAX_CHOICES, MAX_LOGPROBS, check_sampling
from expertmesh.v1.classifier_pb2 import Draw, SampleResponse
from expertmesh.v1.sampling_pb2 import Sampling, TokenLogprob, TokenLogprobs


def decode_draws(draws: Sequence[Draw], rows: int, vocab: int) -> list[model.Draw]:
    """Reads the draws of a request.

    Args:
        draws: One for each row.
        rows: How many rows there are.
        vocab: Tokens of the model.

    Raises:
        InvalidInput: They are not as many as the rows, or a field is out of its range; it is named.
    """
    if len(draws) != rows:
        raise InvalidInput(f"{len(draws)} draws for {rows} rows; give one for each", "draws")
    return [decode_draw(draw, vocab, f"draws[{index}].") for index, draw in enumerate(draws)]


def decode_draw(draw: Draw, vocab: int, where: str = "") -> model.Draw:
    """Reads one draw.

    Args:
        draw: The message.
        vocab: Tokens of the model.
        where: What stands before the name of a field in an error.

    Raises:
        InvalidInput: A field is out of its range; it is named.
    """
    check_sampling(draw.sampling, f"{where}sampling.")
    if not 0 <= draw.choice < MAX_CHOICES:
        raise InvalidInput(f"{where}choice must be in [0, {MAX_CHOICES}), not {draw.choice}", f"{where}choice")
    if draw.position < 0:
        raise InvalidInput(f"{where}position must not be negative", f"{where}position")
    if not NO_LOGPROBS <= draw.logprobs <= MAX_LOGPROBS:
        raise InvalidInput(
            f"{where}logprobs must be in [{NO_LOGPROBS}, {MAX_LOGPROBS}], not {draw.logprobs}", f"{where}logprobs"
        )
    seen = list(draw.seen)
    if seen and not (min(seen) >= 0 and max(seen) < vocab):
        raise InvalidInput(f"{where}seen holds ids outside the vocabulary, [0, {vocab})", f"{where}seen")
    return model.Draw(decode_sampling(draw.sampling), draw.choice, draw.position, seen, draw.logprobs)


def decode_sampling(sampling: Sampling) -> model.Sampling:
    """Reads how tokens are chosen, once it is checked."""
    return model.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
    )


def encode_token(token: Token) -> TokenLogprobs:
    """Writes a chosen token."""
    top = [TokenLogprob(id=id_of_token, logprob=logprob) for id_of_token, logprob in token.top]
    return TokenLogprobs(id=token.id, logprob=token.logprob, top=top)


def encode_tokens(tokens: Sequence[Token]) -> SampleResponse:
    """Writes the tokens of a request, in the order of its draws."""
    return SampleResponse(tokens=[encode_token(token) for token in tokens])
