"""Templates render as Hugging Face's do, sandboxed in a limited process; failures are the request's."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tokenloom.errors import RequestError
from tokenloom.text import chat_template, template_worker
from tokenloom.text.chat_template import ChatTemplate, plain_messages

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <b>&</b> 👋"},
    {
        "role": "assistant",
        "content": "ok",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é<"}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

TEMPLATES = [
    "{% for message in messages %}\n  {% if loop.first %}\n[first]\n  {% endif %}\n{{ message.role }}: "
    "{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}\n",
    "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|"
    "{{ messages[2].tool_calls[0].function.arguments | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% if ns.n > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}{{ ns.n }}",
    "{% macro line(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ line(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ documents is none }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ '=' * 3 }}{{ range(3) | list }}{{ messages | length }}{{ loop is defined }}"
    "{% for i in range(2) %}{{ loop.index }}/{{ loop.length }}{% else %}none{% endfor %}",
    "{% for key, value in tools[0].items() %}{{ key }}{% endfor %}"
    "{% for x in missing %}{% else %}E{% endfor %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers_does(source: str) -> None:
    variables: dict[str, Any] = {"eos_token": "</s>"}
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=source, add_generation_prompt=True, **variables
    )
    ours = ChatTemplate(source).render(
        messages=MESSAGES, tools=TOOLS, documents=None, add_generation_prompt=True, **variables
    )
    assert ours == theirs[0]


def test_strftime_now_gives_the_date() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    found = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render()
    assert before <= found <= datetime.now().strftime("%Y-%m-%d")


def _refusal(source: str, **variables: Any) -> str:
    with pytest.raises(RequestError) as error:
        ChatTemplate(source).render(**{"messages": MESSAGES, **variables})
    assert error.value.param == "messages"
    return str(error.value)


def test_the_templates_own_refusal_is_passed_on() -> None:
    assert "roles must alternate" in _refusal("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_does_not_compile_fails_only_when_used() -> None:
    template = ChatTemplate("line\n{% if %}")
    with pytest.raises(RequestError, match=r"does not compile.*line 2") as error:
        template.render(messages=[])
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content + 1 }}", "{{ messages[9].content.x }}", "{{ 1 // 0 }}", "{{ none['x']['y'] }}"],
)
def test_any_failure_inside_is_the_requests(source: str) -> None:
    assert "chat template refused" in _refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context.environment.globals.clear() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    before = [dict(message) for message in MESSAGES]
    try:
        text = ChatTemplate(source).render(messages=MESSAGES)
    except RequestError:
        text = ""
    assert text == ""
    assert before == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ 99999999 ** 99999999 }}",
        "{{ range(10 ** 12) | sum }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x == ns.x | list }}{{ ns.x | tojson | length }}",
    ],
)
def test_what_runs_for_ever_is_killed(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    start = time.monotonic()
    assert re.search("ran for more than 0.2 seconds|MiB of memory", _refusal(source))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(1000) %}{{ 'x' * 10000 }}{% endfor %}", "wrote over 4194304 characters"),
        ("{{ 'x' * 10000000000 }}", "over 512 MiB of memory"),
        ("{{ [1] * 10000000000 }}", "over 512 MiB of memory"),
        ("{{ ('x' * 9999999) | replace('x', 'y' * 9999999) | length }}", "memory|refused|seconds"),
        ("{{ '%9999999999d' | format(1) }}", "memory|refused|seconds"),
        ("{{ 'x'.ljust(9999999999) | length }}", "over 512 MiB of memory"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory|seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_output_and_memory_are_bounded(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(source).render(messages=MESSAGES)


def test_the_next_template_runs_after_one_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "MAX_SECONDS", 0.1)
        _refusal("{{ 99999999 ** 99999999 }}")
    assert ChatTemplate("{{ messages | length }}").render(messages=MESSAGES) == "3"


def test_a_process_that_was_ended_from_outside_is_started_again() -> None:
    ChatTemplate("a").render()
    process = template_worker.WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert ChatTemplate("{{ 1 + 1 }}").render() == "2"


def test_a_process_that_does_not_start_is_no_fault_of_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(template_worker.template_process, "__file__", str(broken))
    worker = template_worker.TemplateWorker()
    with pytest.raises(OSError, match="it ended"):
        worker.render("a", {}, 2.0)
    monkeypatch.undo()
    assert worker.render("a", {}, 2.0) == "a"
    worker.close()


def test_threads_get_their_own_texts() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda i: ChatTemplate("{{ i }}" * 1000).render(i=i), range(64))
        assert list(texts) == [str(i) * 1000 for i in range(64)]


def test_nothing_of_this_processs_environment_goes_to_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_SERVER__API_KEYS", '["sesame"]')
    worker = template_worker.TemplateWorker()
    assert worker.render("", {}, 2.0) == ""
    assert worker._process is not None
    assert b"sesame" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()
    worker.close()


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x"])
def test_messages_are_such_as_json_can_hold(value: Any) -> None:
    assert "not JSON" in _refusal("{{ messages }}", messages=[value])


def test_multiplication_of_numbers_is_left_alone() -> None:
    assert ChatTemplate("{{ 3 * 4 }} {{ 'ab' * 2 }} {{ 2 * 'c' }}").render() == "12 abab cc"


def test_a_lone_surrogate_in_a_message_is_refused() -> None:
    assert "lone surrogate" in _refusal("{{ messages[0].content }}", messages=[{"content": "\ud800"}])


def test_none_values_are_left_out() -> None:
    assert plain_messages([{"role": "a", "content": None}]) == [{"role": "a"}]


@pytest.mark.parametrize("messages", ["hi", {"role": "user"}, [1], None])
def test_messages_of_the_wrong_shape_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages must be a list of objects") as error:
        plain_messages(messages)
    assert error.value.param == "messages"


def test_a_model_without_a_template_says_so(tmp_path: Any) -> None:
    from tiny_models import tiny_tokenizer
    from tokenloom.text.tokenizer import Tokenizer

    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match="no chat template") as error:
        Tokenizer.from_folder(tmp_path).render_chat(MESSAGES)
    assert error.value.param == "messages"
