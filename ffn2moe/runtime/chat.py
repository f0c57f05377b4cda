"""Write messages as the text that a chat model continues, by the template that its tokenizer carries.

Templates are Jinja, in the dialect of transformers. They come with a model, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ffn2moe.runtime.files import tokenizer_settings
from ffn2moe.runtime.opened import require_text

TEMPLATE_FILE = "chat_template.jinja"
Message = Mapping[str, str]  # role (system, user or assistant) and content


def template_of(folder: Path) -> str | None:
    """Return the chat template of a saved tokenizer; None where it has none."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer_settings(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def require_messages(messages: object) -> list[dict[str, str]]:
    """Return messages as they are. ValueError for no message, and for one without a role and a text."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError('messages are a list of at least one: [{"role": "user", "content": "Who are you?"}]')
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"message {index} is no mapping of role and content: {message!r:.60}")
        role = require_text(message["role"], f"the role of message {index}")
        content = require_text(message["content"], f"the content of message {index}", may_be_empty=True)
        found.append({"role": role, "content": content})
    return found


def rendered(template: str, messages: Sequence[Message], folder: Path) -> str:
    """Return the text of messages with the beginning of the answer; `folder` has the tokenizer's special tokens.

    ValueError for messages that the template refuses, and for a template that cannot be run.
    """
    from jinja2 import TemplateError

    try:
        return (
            _environment()
            .from_string(template)
            .render(messages=messages, add_generation_prompt=True, **_special_tokens(folder))
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from None


def _environment() -> Any:
    """Return Jinja's sandbox as transformers sets it up: what a template can reach is text, lists and its own names."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Read `{% generation %}`, which marks for training what the assistant says, as its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        """Refuse names of Python's internals, by which a template could leave the sandbox."""

        def __init__(*arguments: Any, **named: Any) -> None:
            self, given = arguments[0], dict(*arguments[1:], **named)
            for name in given:
                Names._require_own(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            Names._require_own(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _require_own(name: str) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": _now,
        "namespace": Names,
        "dict": lambda *arguments, **named: dict(*arguments, **named),
    }
    return environment


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return the names of a tokenizer's special tokens."""
    settings = tokenizer_settings(folder)
    found = {key: settings[key] for key in settings if key.endswith("_token") and settings[key]}
    return {
        key: one["content"] if isinstance(one, dict) else one
        for key, one in found.items()
        if isinstance(one, str | dict)
    }


def _json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
