"""What a caller may ask for: the checks of a request, before anything is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.errors import InvalidInput
from expertmesh.model.spec import ModelSpec
from expertmesh.v1.inference_pb2 import (
    CONTRACT_MESH_ONLY,
    ROUTE_DEGRADED,
    ROUTE_FULL_MODEL,
    ClassifyRequest,
    Contract,
    GenerateRequest,
    Route,
    TokenizeRequest,
)
from expertmesh.v1.sampling_pb2 import Sampling
from expertmesh.v1.tokenizer_pb2 import Chat

MAX_TEXTS = 1024
MAX_TEXT_BYTES = 64 * 2**10
MAX_PROMPT_BYTES = 2**20
MAX_MESSAGES = 1024
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100
MAX_PENALTY = 100
DEFAULT_TIMEOUT_S = 30.0
GENERATE_TIMEOUT_S = 600.0


def check_classify(request: ClassifyRequest) -> None:
    """Refuses a call that cannot be served as it is.

    Raises:
        InvalidInput: Names the field and says what to do.
    """
    check_texts(request.texts)
    _check_way(request.contract, request.route)


def check_generate(request: GenerateRequest, spec: ModelSpec) -> None:
    """Refuses a call that cannot be served as it is; how many ids a text has, only the tokenizer can tell.

    Args:
        request: The call.
        spec: The model, for its context and vocabulary.

    Raises:
        InvalidInput: Names the field and says what to do.
    """
    _require(len(request.stop) <= MAX_STOPS, "stop", f"must be at most {MAX_STOPS} texts, not {len(request.stop)}")
    _require(
        len(request.stop_ids) <= MAX_STOP_IDS,
        "stop_ids",
        f"must be at most {MAX_STOP_IDS}, not {len(request.stop_ids)}",
    )
    match request.WhichOneof("prompt"):
        case "text":
            check_prompt(request.text)
        case "ids":
            _check_ids(request.ids.ids, spec)
        case "chat":
            check_chat(request.chat)
        case _:
            raise InvalidInput("there is no prompt: give text, ids or chat", "prompt")
    _require(not request.HasField("max_tokens") or request.max_tokens >= 1, "max_tokens", "must be at least 1")
    _require(not request.HasField("n") or 1 <= request.n <= MAX_CHOICES, "n", f"must be in [1, {MAX_CHOICES}]")
    last_choice = request.first_choice + (request.n if request.HasField("n") else 1)
    _require(request.first_choice >= 0 and last_choice <= MAX_CHOICES, "first_choice", "is out of its range")
    _require(0 <= request.logprobs <= MAX_LOGPROBS, "logprobs", f"must be in [0, {MAX_LOGPROBS}]")
    check_sampling(sampling_of(request, 0))
    for index, text in enumerate(request.stop):
        size = _bytes(text)
        _require(1 <= size <= MAX_STOP_BYTES, f"stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes, not {size}")
    _check_vocabulary(request.stop_ids, spec, "stop_ids")
    _check_way(request.contract, request.route)


def check_tokenize(request: TokenizeRequest) -> None:
    """Refuses a prompt that cannot be told in ids.

    Raises:
        InvalidInput: Names the field and says what to do.
    """
    match request.WhichOneof("prompt"):
        case "text":
            check_prompt(request.text)
        case "chat":
            check_chat(request.chat)
        case _:
            raise InvalidInput("there is no prompt: give text or chat", "prompt")


def check_prompt(text: str) -> None:
    """Refuses an empty prompt and a too long one.

    Raises:
        InvalidInput: Says what to do.
    """
    if not text:
        raise InvalidInput("the prompt is empty", "text")
    _require(_bytes(text) <= MAX_PROMPT_BYTES, "text", f"has more than {MAX_PROMPT_BYTES} bytes of UTF-8; shorten it")


def check_chat(chat: Chat) -> None:
    """Refuses no messages, too many, those without a role, and too long ones; an empty content is a content.

    Raises:
        InvalidInput: Names the message and says what to do.
    """
    count = len(chat.messages)
    _require(1 <= count <= MAX_MESSAGES, "chat.messages", f"must be 1 to {MAX_MESSAGES}, not {count}")
    size = 0
    for index, message in enumerate(chat.messages):
        _require(bool(message.role), f"chat.messages[{index}].role", "is empty")
        size += _bytes(message.role) + _bytes(message.content)
        _require(size <= MAX_PROMPT_BYTES, "chat", f"has more than {MAX_PROMPT_BYTES} bytes of UTF-8; shorten it")


def check_sampling(sampling: Sampling, where: str = "") -> None:
    """Refuses what is out of its range, NaN included.

    Args:
        sampling: How tokens are chosen, every field set.
        where: What stands before the name of a field in an error.

    Raises:
        InvalidInput: Names the field and its range.
    """
    value = sampling.temperature
    _require(0 <= value <= MAX_TEMPERATURE, f"{where}temperature", f"must be in [0, {MAX_TEMPERATURE}], not {value:g}")
    _require(sampling.top_k >= 0, f"{where}top_k", f"must not be negative, not {sampling.top_k}")
    _require(0 < sampling.top_p <= 1, f"{where}top_p", f"must be in (0, 1], not {sampling.top_p:g}")
    _require(0 <= sampling.min_p <= 1, f"{where}min_p", f"must be in [0, 1], not {sampling.min_p:g}")
    value = sampling.repetition_penalty
    _require(0 < value <= MAX_PENALTY, f"{where}repetition_penalty", f"must be in (0, {MAX_PENALTY}], not {value:g}")


def sampling_of(request: GenerateRequest, seed: int) -> Sampling:
    """How a request wants its tokens chosen, with the defaults in place of what it leaves out.

    Args:
        request: The call.
        seed: The call's own, or the one drawn for it.
    """
    return Sampling(
        temperature=request.temperature if request.HasField("temperature") else 1.0,
        top_k=request.top_k,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty if request.HasField("repetition_penalty") else 1.0,
        seed=seed,
    )


def check_texts(texts: Sequence[str], field: str = "texts") -> None:
    """Refuses no texts, too many, empty and too long ones.

    Raises:
        InvalidInput: Names the text and says what to do.
    """
    if not texts:
        raise InvalidInput("there is no text: give at least one", field)
    if len(texts) > MAX_TEXTS:
        raise InvalidInput(
            f"{len(texts)} texts in one call; at most {MAX_TEXTS}: spread them over several calls", field
        )
    for index, text in enumerate(texts):
        where = f"{field}[{index}]"
        if not text or text.isspace():
            raise InvalidInput(f"{where} is empty", where)
        if len(text) > MAX_TEXT_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise InvalidInput(f"{where} has more than {MAX_TEXT_BYTES} bytes of UTF-8; shorten it", where)


def _check_ids(ids: Sequence[int], spec: ModelSpec) -> None:
    longest = spec.context - 1
    if not ids:
        raise InvalidInput("the prompt is empty", "ids")
    _require(len(ids) <= longest, "ids", f"has {len(ids)} ids; at most {longest} leave room for a token: shorten it")
    _check_vocabulary(ids, spec, "ids")


def _check_vocabulary(ids: Sequence[int], spec: ModelSpec, field: str) -> None:
    vocab = spec.embedding.vocab
    for index, id_of_token in enumerate(ids):
        if not 0 <= id_of_token < vocab:
            raise InvalidInput(
                f"{field}[{index}] = {id_of_token} is not in the vocabulary, [0, {vocab})", f"{field}[{index}]"
            )


def _check_way(contract: Contract, route: Route) -> None:
    if contract not in Contract.values():
        raise InvalidInput(f"contract {contract} is not known", "contract")
    if route not in Route.values() or route == ROUTE_DEGRADED:
        raise InvalidInput("route must be ROUTE_MESH or ROUTE_FULL_MODEL, or be left out", "route")
    if route == ROUTE_FULL_MODEL and contract == CONTRACT_MESH_ONLY:
        raise InvalidInput("CONTRACT_MESH_ONLY does not go with ROUTE_FULL_MODEL", "contract")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InvalidInput(f"{field} {message}", field)
