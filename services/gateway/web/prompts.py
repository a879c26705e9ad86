"""Prompts as clients of OpenAI write them: texts, token ids, and messages."""

from __future__ import annotations

from typing import Any

from expertmesh.errors import InvalidInput
from expertmesh.serving.requests import MAX_MESSAGES
from expertmesh.v1.inference_pb2 import GenerateRequest
from expertmesh.v1.tokenizer_pb2 import Chat, ChatMessage

from .fields import Fields

MAX_PROMPTS = 64
MAX_PROMPT_IDS = 2**20


def read_prompts(fields: Fields, context: int) -> list[GenerateRequest]:
    """The field `prompt`: a string, a list of strings, a list of token ids, or a list of such lists.

    Args:
        fields: What to take it from.
        context: Most ids that a prompt may have; 0 if that is not known here.

    Raises:
        InvalidInput: It is none of these, or too many or too long.
    """
    value = fields.take("prompt")
    if isinstance(value, str):
        return [GenerateRequest(text=fields.checked_string(value, "prompt"))]
    if value == []:
        raise InvalidInput("the prompt is empty", "prompt")
    if not isinstance(value, list):
        raise fields.error("prompt", "must be a string, a list of strings, token ids, or a list of lists of token ids")
    if type(value[0]) is int:
        return [_of_ids(fields, value, "prompt", context)]
    if len(value) > MAX_PROMPTS:
        raise fields.error("prompt", f"has {len(value)} entries; at most {MAX_PROMPTS}")
    return [_of_entry(fields, entry, f"prompt[{index}]", context) for index, entry in enumerate(value)]


def read_chat(fields: Fields) -> Chat:
    """The field `messages`: each with a role and a content, which is a text or a list of parts that are texts.

    The texts of parts are put together as they are, with nothing in between. An answer may come back as clients keep
    it, with the fields that it has empty.

    Raises:
        InvalidInput: They are not like that, none, or too many.
    """
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        raise fields.error("messages", 'must be a list of {"role": "...", "content": "..."}')
    if len(value) > MAX_MESSAGES:
        raise fields.error("messages", f"has {len(value)} entries; at most {MAX_MESSAGES}")
    return Chat(messages=[_read_message(fields, entry, f"messages[{index}]") for index, entry in enumerate(value)])


def _of_entry(fields: Fields, entry: Any, name: str, context: int) -> GenerateRequest:
    if isinstance(entry, list):
        return _of_ids(fields, entry, name, context)
    return GenerateRequest(text=fields.checked_string(entry, name))


def _of_ids(fields: Fields, value: list[Any], name: str, context: int) -> GenerateRequest:
    request = GenerateRequest()
    if not value:
        raise fields.error(name, "has no token")
    request.ids.ids.extend(fields.checked_ids(value, name, context or MAX_PROMPT_IDS))
    return request


def _read_message(fields: Fields, entry: Any, name: str) -> ChatMessage:
    if not isinstance(entry, dict):
        raise fields.error(name, "must be an object with role and content")
    message = Fields(entry, f"{name}.")
    role, content = message.string("role"), message.take("content")
    if not role:
        raise message.error("role", "must be a string such as user")
    # OpenAI documents `name` as an optional name for the participant, and the contract's messages have a role and a
    # content, so no template could show it: it must be a string, and goes no further.
    message.string("name")
    # What an answer of OpenAI has beside its text, as clients send it back.
    message.neutral("tool_calls", [], otherwise="no tools are called here: leave it out")
    message.neutral("function_call", otherwise="no functions are called here: leave it out")
    message.neutral("audio", otherwise="the model reads nothing but text: leave it out")
    message.neutral("refusal", "", otherwise="leave it out, and send its text as content")
    message.neutral("annotations", [], otherwise="the model reads nothing but content: leave it out")
    if content is None:
        raise message.error("content", 'is missing; give a text, which may be ""')
    if isinstance(content, list):
        content = "".join(_read_part(message, part, f"content[{index}]") for index, part in enumerate(content))
    message.end()
    return ChatMessage(role=role, content=message.checked_string(content, "content"))


def _read_part(message: Fields, part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise message.error(name, "must be an object with type and text")
    if part.get("type") != "text":
        raise message.error(f"{name}.type", 'must be "text": the model reads nothing else')
    return message.checked_string(part.get("text"), f"{name}.text")
