from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import InvalidInput, Overloaded
from expertmesh.tokenization import chat
from expertmesh.tokenization.chat import ChatTemplate

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ASKED = [("user", "Who was Romeo?")]
TALK = [
    ("system", "Be brief, and say <b>\"no\"</b> & 'yes'."),
    ("user", "Hi 🎉\n  there "),
    ("assistant", "Hello."),
    ("user", "Who was Romeo?"),
]

INSTRUCT = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + (system_message if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MARKED = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
    {% if message.role == 'assistant' %}{% generation %}
<|im_start|>assistant
{{ message.content }}<|im_end|>
    {% endgeneration %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if tools is not none or tools %}tools{% endif %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
CHANNELS = """\
{%- macro header(role, channel=none) -%}
    {{- '<|start|>' + role }}{% if channel %}{{ '<|channel|>' + channel }}{% endif %}{{ '<|message|>' -}}
{%- endmacro -%}
{%- set ns = namespace(last='', count=0, effort=reasoning_effort if reasoning_effort is defined else 'medium') -%}
{{- header('system') }}Effort: {{ ns.effort }}. Roles: {{ messages | map(attribute='role') | list | tojson }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'system', 'developer'] %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set role = 'developer' if message.role == 'system' else message.role %}
    {{- header(role, 'final' if role == 'assistant') }}{{ message.content | tojson(indent=2) }}
    {%- set ns.last = role %}
{%- endfor -%}
{{- '<|return|>' if ns.last == 'assistant' else '<|end|>' }}{{ ns.count }}{{ strftime_now('%Y') | length }}
{%- if add_generation_prompt %}{{- header('assistant') }}{% endif -%}
"""


@cache
def original() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINTS / "olmoe")


@pytest.fixture
async def template() -> AsyncIterator[Callable[[str], ChatTemplate]]:
    made: list[ChatTemplate] = []

    def make(source: str) -> ChatTemplate:
        made.append(ChatTemplate(source, SPECIAL))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def refusal(template: ChatTemplate, messages: Sequence[tuple[str, str]] = ASKED) -> str:
    with pytest.raises(InvalidInput) as caught:
        await template.render(messages)
    assert caught.value.field == "messages"
    return str(caught.value)


def ended(pid: int, timeout_s: float) -> bool:
    """Whether a process ends in time; True also for one that is gone already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize("source", [INSTRUCT, MARKED, CHANNELS, PLAIN], ids=["instruct", "marked", "channels", "plain"])
@pytest.mark.parametrize("messages", [ASKED, TALK, TALK[1:], TALK[:3]], ids=["one", "talk", "bare", "answered"])
async def test_texts_are_those_of_transformers(
    source: str, messages: list[tuple[str, str]], template: Callable[[str], ChatTemplate]
) -> None:
    plain = [{"role": role, "content": content} for role, content in messages]
    expected = original().apply_chat_template(plain, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert await template(source).render(messages) == expected


async def test_what_the_template_says_is_told(template: Callable[[str], ChatTemplate]) -> None:
    said = await refusal(template(INSTRUCT), [("assistant", "Hello.")])
    assert said == "the model's chat template refuses the messages: roles must take turns"
    assert "(" * 200 in await refusal(template("{{ raise_exception('\\n' ~ '(' * 5000) }}"))
    assert len(await refusal(template("{{ raise_exception('\\n' ~ '(' * 5000) }}"))) < 300


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "too much time"),
        ("{% for m in messages * 10**8 %}{% endfor %}", "too much"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "too much"),
        ("{{ '%9999999999d' % 1 }}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 2**21 }}", "longer than 1048576 bytes"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "longer than 1048576 bytes"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{" + "(" * 9000 + "1" + ")" * 9000 + "}}", "RecursionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
async def test_a_template_that_cannot_be_rendered_is_refused(
    source: str, reason: str, template: Callable[[str], ChatTemplate]
) -> None:
    bad = template(source)
    started_s = time.monotonic()
    assert reason in await refusal(bad)
    assert time.monotonic() - started_s < chat.REPLY_TIMEOUT_S + 1
    assert reason in await refusal(bad)


async def test_the_process_is_kept_and_started_again_when_it_ended(template: Callable[[str], ChatTemplate]) -> None:
    looping = (
        "{% if messages|length > 1 %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    )
    one = template(looping + "{% endif %}{{ messages[0].content }}")
    assert one._process is None
    assert await one.render([("user", "a")]) == "a"
    first = one._process
    assert first is not None
    assert await one.render([("user", "b")]) == "b"
    assert one._process is first
    assert "too much time" in await refusal(one, TALK)
    assert first.returncode is not None  # by its own alarm, which asyncio may see as 255
    assert await one.render([("user", "c")]) == "c"
    second = one._process
    assert second is not None
    second.kill()
    await second.wait()
    assert await one.render([("user", "d")]) == "d"
    await one.close()
    assert await one.render([("user", "e")]) == "e"


async def test_a_call_that_is_cancelled_leaves_nothing_behind(template: Callable[[str], ChatTemplate]) -> None:
    one = template("{% for i in range(99999) %}{% if messages|length > 1 %}{% for i in range(99999) %}"
                   "{% endfor %}{% endif %}{% endfor %}{{ messages[0].content }}")  # fmt: skip
    assert await one.render([("user", "a")]) == "a"
    process = one._process
    assert process is not None
    call = asyncio.create_task(one.render(TALK))
    while one._process is not None:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert process.returncode == -signal.SIGKILL
    assert await one.render([("user", "b")]) == "b"


async def test_a_rendering_does_not_hold_up_anything_else(template: Callable[[str], ChatTemplate]) -> None:
    looping = template("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}")
    call = asyncio.create_task(looping.render(ASKED))
    assert await template(PLAIN).render(ASKED) == "user: Who was Romeo?\n"
    assert not call.done()
    with pytest.raises(InvalidInput):
        await call


async def test_calls_at_once_get_their_own_texts(template: Callable[[str], ChatTemplate]) -> None:
    one = template("{{ messages[0].content }}")
    texts = [f"text {index}" * index for index in range(1, 40)]
    assert await asyncio.gather(*(one.render([("user", text)]) for text in texts)) == texts


async def test_too_many_calls_at_once_are_refused(template: Callable[[str], ChatTemplate]) -> None:
    one = template("{{ messages[0].content }}")
    calls = [one.render(ASKED) for _ in range(chat.MAX_WAITING + 3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 3
    assert results.count("Who was Romeo?") == chat.MAX_WAITING


@pytest.mark.parametrize(
    "messages",
    [[], [("user", "a")] * (chat.MAX_MESSAGES + 1), [("user", "é" * (chat.MAX_MESSAGES_BYTES // 2))]],
    ids=["none", "many", "long"],
)
async def test_messages_have_bounds(messages: list[tuple[str, str]], template: Callable[[str], ChatTemplate]) -> None:
    one = template(PLAIN)
    await refusal(one, messages)
    assert one._process is None


async def test_messages_at_their_bounds_are_rendered(template: Callable[[str], ChatTemplate]) -> None:
    long = "é" * (chat.MAX_MESSAGES_BYTES // 2 - 2)
    assert await template("{{ messages[0].content }}").render([("user", long)]) == long
    assert await template("{{ messages|length }}").render([("user", "a")] * chat.MAX_MESSAGES) == str(chat.MAX_MESSAGES)


PARENT = """
import asyncio, sys
from expertmesh.tokenization.chat import ChatTemplate

async def main():
    template = ChatTemplate(sys.argv[1], {})
    if sys.argv[2] == "idle":
        await template.render([("user", "a")])
        print(template._process.pid, flush=True)
        await asyncio.Event().wait()
    await template.render([("user", "a")])
    process = template._process
    call = asyncio.create_task(template.render([("user", "a")] * 2))
    while template._process is not None:
        await asyncio.sleep(0)
    print(process.pid, flush=True)
    await call

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["idle", "busy"])
def test_the_process_ends_with_its_parent(when: str) -> None:
    looping = (
        "{% if messages|length > 1 %}{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    )
    command = [sys.executable, "-c", PARENT, looping + "{% endif %}", when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid, 0)
        parent.kill()
    assert ended(pid, 10.0)
