"""What the small files beside a Hugging Face tokenizer say: added tokens, special tokens, the chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from expertmesh.errors import BadCheckpoint

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_FILE_BYTES = 256 * 2**20
MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True)
class TokenSettings:
    """The settings of a tokenizer; every file of them is optional.

    Attributes:
        named: Text of each named token (`bos_token`, `eos_token`, …), as chat templates know them.
        special: Texts of further tokens that decoding leaves out.
        added: Tokens that the vocabulary may lack, with their ids, ascending.
        add_bos: Whether a text starts with the token of that name; None where nothing is said.
        add_eos: Whether a text ends with the token of that name; None where nothing is said.
        legacy: Whether a SentencePiece tokenizer puts a space before the text behind a special token, too.
        prefix_space: Whether a SentencePiece tokenizer puts a space before a text.
        chat_template: Source of the template; None for a model that does not chat.
    """

    named: dict[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    added: tuple[tuple[int, AddedToken], ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = False
    prefix_space: bool = True
    chat_template: str | None = None

    @classmethod
    def load(cls, folder: Path) -> TokenSettings:
        """Reads the files that are there.

        Raises:
            BadCheckpoint: One of them is damaged.
        """
        config = _read_table(folder / CONFIG_FILE)
        values = dict(config)
        if "added_tokens_decoder" not in config:
            values |= _read_table(folder / SPECIAL_FILE)
        named = {key: text for key, value in values.items() if key.endswith("_token") and (text := _text_of(value))}
        further = values.get("extra_special_tokens") or values.get("additional_special_tokens") or ()
        if isinstance(further, dict):
            named |= {str(key): text for key, value in further.items() if (text := _text_of(value))}
            further = ()
        special = tuple(text for value in further if (text := _text_of(value)))
        return cls(
            named=named,
            special=special,
            added=_added_tokens(folder, config, {*named.values(), *special}),
            add_bos=_flag(config, "add_bos_token"),
            add_eos=_flag(config, "add_eos_token"),
            legacy=_flag(config, "legacy") or False,
            prefix_space=_flag(config, "add_prefix_space") is not False,
            chat_template=_chat_template(folder, config),
        )


def read_bytes(path: Path) -> bytes:
    """Reads a file of a tokenizer.

    Raises:
        BadCheckpoint: It cannot be read or is too large to be one.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadCheckpoint(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path}: cannot be read ({error.strerror})") from None


def _read_table(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{path}: is not JSON") from None
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path}: does not hold a table")
    return values


def _text_of(token: Any) -> str | None:
    """A token's text; a token is a string or a table with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _flag(config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _added_tokens(folder: Path, config: dict[str, Any], special: set[str]) -> tuple[tuple[int, AddedToken], ...]:
    """The tokens of `added_tokens_decoder`, or of the older `added_tokens.json` where the former is missing."""
    try:
        if "added_tokens_decoder" in config:
            tokens = [(int(id_), _added_token(value)) for id_, value in config["added_tokens_decoder"].items()]
        else:
            tokens = [
                (int(id_), AddedToken(text, special=text in special, normalized=text not in special))
                for text, id_ in _read_table(folder / ADDED_FILE).items()
            ]
        if any(not 0 <= id_ < 2**31 for id_, _ in tokens):
            raise ValueError
    except (ValueError, TypeError, AttributeError, KeyError):
        raise BadCheckpoint(f"{folder}: its added tokens are not understood") from None
    return tuple(sorted(tokens, key=lambda token: token[0]))


def _added_token(value: Any) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template's file, or what older folders have in their configuration: a string, or named templates."""
    path = folder / TEMPLATE_FILE
    template = config.get("chat_template")
    if path.exists():
        try:
            template = read_bytes(path).decode()
        except UnicodeDecodeError:
            raise BadCheckpoint(f"{path}: is not UTF-8") from None
    elif isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise BadCheckpoint(f"{folder / CONFIG_FILE}: its chat_template is not a text")
    if template is not None and len(template.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        raise BadCheckpoint(f"{folder}: its chat template is larger than {MAX_TEMPLATE_BYTES} bytes")
    return template or None
