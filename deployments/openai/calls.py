"""Tool calls in a model's text: how they are recognised, and the grammar that makes a model write them.

One dialect so far, that of Hermes, Qwen2.5 and ERNIE-4.5: ``<tool_call>`` and a JSON object with ``name`` and
``arguments``. vLLM's and FastDeploy's parsers ``hermes``, ``ernie45`` and ``ernie-x1`` read the same form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto

from deployments.openai.call_json import CallReader
from deployments.openai.markers import partial_length
from deployments.openai.parts import CallArguments, CallBegins, Content, Part
from deployments.openai.structure import Element, json_element
from deployments.openai.tools import Calling, Tool
from engine.chat.template import ChatTemplate
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Dialect:
    """Calls between two markers, each a JSON object."""

    begin: str
    end: str

    def forced(self, calling: Calling) -> Element:
        """An answer of nothing but calls, one at least."""
        return {
            "type": "tags_with_separator",
            "tags": [self._tag(tool) for tool in calling.tools],
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not calling.parallel,
        }

    def free(self, calling: Calling) -> Element:
        """Text, in which what begins as a call goes on as one."""
        return {
            "type": "triggered_tags",
            "triggers": [self.begin],
            "tags": [self._tag(tool) for tool in calling.tools],
            "at_least_one": False,
            "stop_after_first": False,
        }

    def _tag(self, tool: Tool) -> Element:
        return {
            "type": "tag",
            "begin": f'{self.begin}\n{{"name": {json.dumps(tool.name)}, "arguments": ',
            "content": json_element(tool.arguments_schema, max_whitespace=1),
            "end": f"}}\n{self.end}",
        }


HERMES = Dialect(begin="<tool_call>", end="</tool_call>")

DIALECTS = {"hermes": HERMES, "ernie45": HERMES, "ernie-x1": HERMES}
"""By the names that vLLM and FastDeploy gave them."""


def dialect(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in DIALECTS:
        raise ConfigError(f"there is no tool call parser {name!r}; there are {', '.join(DIALECTS)}")
    return DIALECTS[name]


def dialect_of(template: ChatTemplate) -> Dialect | None:
    """The dialect that a model was trained on, as its template shows; None for one that nobody here reads.

    A template without tools gets them spelled out in Hermes' form (:mod:`engine.chat.tools`).
    """
    if not template.supports_tools:
        return HERMES
    source = template.tool_source or ""
    # Qwen3-Coder writes XML between the same markers.
    return HERMES if HERMES.begin in source and "<function=" not in source else None


class _State(Enum):
    TEXT = auto()
    CALL = auto()
    BEHIND = auto()  # the end marker comes, or doesn't


class CallParser:
    """Finds the calls in one choice's text; the rest is content.

    White space around calls is dropped. What begins like a call and is none stays content. A call whose end the model
    forgot, or that the limit on tokens cut off, is a call as soon as its name is known.
    However the text is cut into pieces, the parts joined are the same.

    Args:
        parallel: False lets the first call through, and no other.

    Attributes:
        num_calls: calls so far.
    """

    def __init__(self, dialect: Dialect, *, parallel: bool) -> None:
        self._begin, self._end = dialect.begin, dialect.end
        self._parallel = parallel
        self._state = _State.TEXT
        self._held = ""
        self._space = ""  # white space that is dropped if a call follows
        self._behind_call = False  # so that white space is dropped
        self._reader = CallReader()
        self._named = False  # the call under way was passed on
        self._raw: list[str] = []  # the call under way, in case it is none
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        """Take in more text."""
        parts: list[Part] = []
        self._held += text
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The text has ended: what was held back comes out."""
        parts: list[Part] = []
        if self._state is _State.CALL and not self._named:
            self._content("".join(self._raw), parts)
        elif self._state is _State.TEXT:
            self._content(self._held, parts)
        if self._space:
            parts.append(Content(self._space))
        self._held = self._space = ""
        return parts

    def _step(self, parts: list[Part]) -> bool:
        """Go on by one state; False when more text is needed."""
        if self._state is _State.TEXT:
            return self._read_text(parts)
        return self._read_call(parts) if self._state is _State.CALL else self._read_end()

    def _content(self, text: str, parts: list[Part]) -> None:
        if self._behind_call:
            text = text.lstrip()
        if not text:
            return
        self._behind_call = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            parts.append(Content(kept))

    def _read_text(self, parts: list[Part]) -> bool:
        before, found, rest = self._held.partition(self._begin)
        if not found:
            certain = len(before) - partial_length(before, self._begin)
            before, rest = before[:certain], before[certain:]
        self._content(before, parts)
        self._held = rest
        if found:
            self._state, self._reader, self._named, self._raw = _State.CALL, CallReader(), False, [self._begin]
        return bool(found)

    def _read_call(self, parts: list[Part]) -> bool:
        text, self._held = self._held, ""
        reader = self._reader
        arguments = reader.push(text)
        if reader.ended:
            self._held = reader.rest
            text = text[: len(text) - len(reader.rest)]
        shown = self._parallel or self.num_calls == 0 or self._named
        if reader.name is not None and not self._named and shown:
            self._named = True
            self._space = ""
            parts.append(CallBegins(self.num_calls, reader.name))
            self.num_calls += 1
        if self._named and arguments:
            parts.append(CallArguments(self.num_calls - 1, arguments))
        elif not self._named:
            self._raw.append(text)
        if not reader.ended:
            return False
        if reader.name is None:
            self._content("".join(self._raw), parts)
            self._state = _State.TEXT
        else:
            self._behind_call = True
            self._state = _State.BEHIND
        return True

    def _read_end(self) -> bool:
        text = self._held.lstrip()
        if not text.startswith(self._end) and self._end.startswith(text):
            return False
        self._held = text.removeprefix(self._end)
        self._state = _State.TEXT
        return True
