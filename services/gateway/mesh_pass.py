"""One pass of texts to classify through the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from expertmesh import wire
from expertmesh.dispatch import Scores, StageCall, classify, drive_async
from expertmesh.errors import CorruptReply, MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.serving.inspection import Observer
from expertmesh.serving.passes import PROFILE_SEPARATOR, Answer, ExpertTokens, Provenance, kept, to_answers
from expertmesh.tokenization.tokenizer import Encoded
from expertmesh.v1.inference_pb2 import ROUTE_MESH
from expertmesh.v1.tokenizer_pb2 import EncodeRequest, EncodeResponse

from .expert_calls import Absence
from .mesh import Mesh
from .stage_calls import StageCalls


class MeshPass:
    """The state of one pass: who answered, and where the time went.

    Args:
        mesh: The services.
        deadline: Of the whole pass.
        observe: Is shown every stage call and its result.
        absence: What is done about experts that cannot be had.
    """

    def __init__(
        self, mesh: Mesh, deadline: Deadline, observe: Observer | None = None, absence: Absence = Absence.FAILS
    ) -> None:
        self._mesh = mesh
        self._spec = mesh.manifest.spec
        self._deadline = deadline
        self._observe = observe
        apart = mesh.shared_apart and observe is None  # whoever compares traces sees one residual stream
        self._calls = StageCalls(mesh, deadline, shared_apart=apart, absence=absence)
        self._require = mesh.require_complete if absence is Absence.FAILS else mesh.require_stages

    async def run(self, texts: Sequence[str]) -> Sequence[Answer | MeshError]:
        """Answers texts, each by a classification or by the error of that one text.

        Raises:
            Unavailable: A stage or an expert has no live replica left; names it.
            MeshError: The pass failed as a whole.
        """
        self._require()
        with self._calls.stopwatch.time("tokenizer"):
            encoded = await self._encode(texts)
        lengths_B = kept(encoded)
        expert_tokens = ExpertTokens(self._spec, lengths_B)
        scores = await self._scores(encoded.ids_T, lengths_B, expert_tokens) if len(lengths_B) else None
        profile = PROFILE_SEPARATOR.join(sorted(self._calls.profiles))
        provenance = Provenance(ROUTE_MESH, self._calls.is_exact, profile)
        return to_answers(self._spec, encoded, scores, expert_tokens, provenance, self._calls.stopwatch)

    async def _scores(self, ids_T: Any, lengths_B: Any, expert_tokens: ExpertTokens) -> Scores:
        given_s = perf_counter()

        async def answer(call: StageCall) -> Any:
            nonlocal given_s
            self._calls.stopwatch.seconds["combine"] += perf_counter() - given_s
            result = await self._calls.answer(call)
            given_s = perf_counter()
            expert_tokens.observe(call, result)
            if self._observe is not None:
                self._observe(call, result)
            return result

        return await drive_async(classify(self._spec, ids_T, lengths_B), answer)

    async def _encode(self, texts: Sequence[str]) -> Encoded:
        def read(reply: EncodeResponse, origin: Origin) -> Encoded:
            lengths_B = wire.decode(reply.lengths, wire.INT32, (len(texts),), "lengths")
            total = int(lengths_B.sum(dtype=np.int64))
            if lengths_B.min() < 0 or lengths_B.max() > self._spec.context or len(reply.truncated) != len(texts):
                raise CorruptReply("lengths or truncated cannot be right")
            ids_T = wire.decode(reply.ids, wire.INT32, (total,), "ids") if total else np.empty(0, np.int32)
            if total and not 0 <= ids_T.min() <= ids_T.max() < self._spec.embedding.vocab:
                raise CorruptReply("ids cannot be right")
            return Encoded(ids_T, lengths_B, np.array(reply.truncated, dtype=np.bool_))

        return await self._mesh.tokenizer.call("Encode", EncodeRequest(texts=texts), self._deadline, read)
