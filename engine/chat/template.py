"""From a conversation to the string a model was trained on.

The repository's own Jinja template wins (`chat_template.jinja`, else `chat_template` of `tokenizer_config.json`), run
in Jinja's sandbox with the functions Hugging Face gives it. Without one it is ERNIE-4.5's format, where the vocabulary
has the tokens of that; other models can then not chat.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.chat.guard import map_strings, protector, unused_character
from engine.chat.tools import with_tools, without_calls
from engine.errors import ConfigError, RequestError

Message = Mapping[str, Any]
"""``{"role": …, "content": str | [{"type": "text", "text": …}, …]}`` and what else a template reads."""

ERNIE_TEMPLATE = r"""
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
  {%- set content = message['content'] or '' -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {{- content + '\n' -}}
  {%- elif message['role'] == 'system' -%}
    {{- raise_exception('a system message must be the first message') -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'User: ' + content + '\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'Assistant: ' + content + '<|end_of_sentence|>' -}}
  {%- else -%}
    {{- raise_exception('role ' + (message['role'] | string | tojson) + ' is none of system, user, assistant') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""
"""The chat string of ERNIE-4.5 300B-A47B, 21B-A3B and 0.3B."""

ERNIE_BEGIN = "<|begin_of_sentence|>"
"""The token that tells a vocabulary of ERNIE-4.5."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja; None for a model without a template, which refuses every conversation.
        tool_source: another template for conversations with tools, where the repository has one.
        special_tokens: ``bos_token``, ``eos_token``, … as variables for the template.

    Attributes:
        source: the Jinja text.
        special_tokens: as given.
        tool_source: that for conversations with tools.
        supports_tools: it reads the variable ``tools``. For one that doesn't, tools, calls and their results are
            spelled out in ordinary messages (:mod:`engine.chat.tools`).

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        self.tool_source = tool_source or source
        self.special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._template = None if source is None else environment.from_string(source)
            self._tool_template = environment.from_string(tool_source) if tool_source else self._template
            self._supports_calls = "tool_calls" in (self.tool_source or "")
            self.supports_tools = "tools" in meta.find_undeclared_variables(environment.parse(self.tool_source or ""))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from None

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer_config: Mapping[str, Any], *, special_tokens: Mapping[str, str], ernie: bool
    ) -> ChatTemplate:
        """The repository's template, else ERNIE-4.5's format if `ernie`, else none; errors as for the class."""
        templates = tokenizer_config.get("chat_template")
        if isinstance(templates, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        else:
            named = {"default": templates}
        path = folder / "chat_template.jinja"
        if path.is_file():
            named["default"] = path.read_text(encoding="utf-8")
        if named.get("default") is None and ernie:
            named["default"] = ERNIE_TEMPLATE
        return cls(named.get("default"), tool_source=named.get("tool_use"), special_tokens=special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as one string.

        Raises:
            RequestError: field "messages": the template refuses them, or a content part is not text.
        """
        conversation = self._readable(messages, variables)
        return self._render(conversation, add_generation_prompt=add_generation_prompt, **variables)

    def render_guarded(
        self,
        messages: Sequence[Message],
        special_names: Iterable[str],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> tuple[str, str]:
        """The conversation with names of special tokens in it guarded, and the guard; see :mod:`engine.chat.guard`.

        Raises:
            RequestError: as :meth:`render`.
        """
        conversation = self._readable(messages, variables)
        guard = unused_character([conversation, variables])
        protect = protector(list(special_names), guard)
        # A role is the template's to compare, and some templates build a special token from it.
        guarded = [
            {key: value if key == "role" else map_strings(value, protect) for key, value in m.items()}
            for m in conversation
        ]
        more = {key: map_strings(value, protect) for key, value in variables.items()}
        return self._render(guarded, add_generation_prompt=add_generation_prompt, **more), guard

    def _readable(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages in roles and fields that the template knows; tools that it doesn't read leave ``variables``."""
        conversation = normalize(messages)
        if self._template is None:
            return conversation
        if not self._supports_calls:
            conversation = without_calls(conversation)
        if not self.supports_tools and (tools := variables.pop("tools", None)):
            conversation = with_tools(conversation, tools)
        return conversation

    def _render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        template = self._tool_template if variables.get("tools") else self._template
        if template is None:
            raise RequestError(
                "the model has no chat template: put its chat_template.jinja into the model folder, "
                "or send a whole prompt instead of messages",
                field="messages",
            )
        try:
            return template.render(messages=messages, **{**self.special_tokens, **variables})
        except _RefusedError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", field="messages") from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}", field="messages"
            ) from None


def normalize(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined by newlines, arguments of tool calls as objects.

    Raises:
        RequestError: field "messages": there are none, one has no role, or a content part is not text.
    """
    if not messages:
        raise RequestError("messages is empty; at least one message is needed", field="messages")
    return [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} has no role; expected an object with role and content", field="messages")
    result = dict(message)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        texts = []
        for j, part in enumerate(content):
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise RequestError(
                    f"{where}.content[{j}] is of type {kind!r}; this model takes parts of type 'text'", field="messages"
                )
            texts.append(part["text"])
        result["content"] = "\n".join(texts)
    elif not (content is None or isinstance(content, str)):
        raise RequestError(
            f"{where}.content is a {type(content).__name__}; expected a string or a list of text parts",
            field="messages",
        )
    else:
        result["content"] = content
    if message.get("tool_calls"):
        result["tool_calls"] = [_parsed_call(call) for call in message["tool_calls"]]
    return result


def _parsed_call(call: Any) -> Any:
    """OpenAI writes a call's arguments as a JSON string; templates iterate over the object in it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _RefusedError(Exception):
    """What a template says with raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """Hugging Face's ``{% generation %}…{% endgeneration %}`` marks what to train on; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)
