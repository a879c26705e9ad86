"""How probable a language model finds a text: nats, from windows that overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.train.routes import Routes, shares

BATCH_LOGITS = 2**24


@dataclass(frozen=True)
class Likelihood:
    """What was measured.

    Attributes:
        nats: Sum of the negative log-likelihoods of all tokens.
        tokens: How many these are.
        counts_LE: Rows that each expert of each layer was given, those of overlaps twice.
    """

    nats: float
    tokens: int
    counts_LE: npt.NDArray[np.int64]

    @property
    def shares_LE(self) -> list[list[float]]:
        """Share of a layer's rows that each expert was given."""
        return shares(self.counts_LE)


@dataclass(frozen=True)
class Window:
    """Tokens [start, start + length) as input; those behind the inputs from `counted` on are counted."""

    start: int
    length: int
    counted: int


@dataclass(frozen=True)
class TextIds:
    """A text as a language model is asked about it.

    Attributes:
        stream_T: A token that the first one is predicted from, then the text's tokens.
        characters: Characters of the text that the tokens behind the first stand for.
    """

    stream_T: npt.NDArray[np.int64]
    characters: int


def read_ids(folder: Path, manifest: Manifest, text: str) -> TextIds:
    """Gives the ids of a text.

    The first token is predicted from the tokenizer's start token, or else from the model's end token. Where a model
    has neither, the text's first token is not predicted, and its characters do not count.

    Raises:
        SetupError: There is nothing to predict.
        BadCheckpoint: The tokenizer is missing or damaged.
    """
    tokenizer = load_tokenizer(folder, manifest)
    assert isinstance(tokenizer, LanguageTokenizer)
    ids = tokenizer.encode(text, special=False)
    before = tokenizer.encode("")[:1] or list(manifest.spec.head.end_ids[:1])
    if len(before + ids) < 2:
        raise SetupError("the text has no token to predict")
    unpredicted = 0 if before else len(tokenizer.decode([ids[:1]])[0])
    return TextIds(np.array(before + ids, np.int64), len(text) - unpredicted)


def windows_of(tokens: int, window: int, stride: int) -> list[Window]:
    """Covers the tokens behind the first `tokens` inputs, each counted once.

    Every window but the first counts only its last tokens, at most `stride`: these see at least `window - stride`
    tokens before them. The last window is as long as the others and counts what is left.
    """
    places = []
    end = 0
    while end < tokens:
        last = min(max(end + stride, window), tokens)
        start = max(last - window, 0)
        places.append(Window(start, last - start, end - start))
        end = last
    return places


def measure(
    model: FullModel,
    ids: TextIds,
    window: int,
    stride: int,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Adds up how improbable every token of a text is, in the arithmetic that the model is served with.

    Args:
        model: A language model.
        ids: The text.
        window: Tokens of a window, at most the model's context.
        stride: Tokens that each window but the first counts, at most `window`.
        progress: Is told how many windows are done, and of how many.
    """
    device = next(model.parameters()).device
    stream_T = torch.from_numpy(ids.stream_T)
    places = windows_of(len(stream_T) - 1, window, stride)
    batch_windows = max(1, BATCH_LOGITS // (window * model.spec.embedding.vocab))
    nats, counts_LE = 0.0, np.zeros((len(model.spec.sparse_layers), model.spec.router.experts), np.int64)
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(places), batch_windows):
            batch, routes = places[first : first + batch_windows], Routes()
            inputs_T = torch.cat([stream_T[place.start : place.start + place.length] for place in batch])
            lengths_B = torch.tensor([place.length for place in batch])
            logits_TV = model.logits(inputs_T.to(device), lengths_B.to(device), routes)
            nats += _counted(logits_TV, stream_T.to(device), batch)
            counts_LE += routes.counts_LE(counts_LE.shape[1]).numpy()
            if progress is not None:
                progress(first + len(batch), len(places))
    return Likelihood(nats, len(stream_T) - 1, counts_LE)


def _counted(logits_TV: Any, stream_T: torch.Tensor, batch: list[Window]) -> float:
    total = 0.0
    for place, own_TV in zip(batch, torch.split(logits_TV, [place.length for place in batch]), strict=True):
        end = place.start + place.length
        targets_T = stream_T[place.start + place.counted + 1 : end + 1]
        losses_T = F.cross_entropy(own_TV[place.counted :].float(), targets_T, reduction="none")
        total += float(losses_T.double().sum())
    return total
