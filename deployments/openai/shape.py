"""What shape an answer takes: thoughts, tool calls, structure; how the model is held to it, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.openai.calls import CallParser, Dialect
from deployments.openai.parts import Content, Part, Thought
from deployments.openai.reasoning import END, Thinking, ThoughtParser
from deployments.openai.structure import Element, Options, Structure, constant, grammar_text, sequence, tagged
from deployments.openai.tools import Calling
from engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one answer.

    Attributes:
        calling: which tools it may call.
        dialect: how calls are written; None where there are none.
        thinking: how thoughts are written; None for a model without.
        begun: the prompt ends with the beginning of thoughts.
    """

    calling: Calling
    dialect: Dialect | None = None
    thinking: Thinking | None = None
    begun: bool = False

    def __post_init__(self) -> None:
        if self.calling.mode != "none" and self.dialect is None:
            raise RequestError(
                "the model's chat template writes tool calls in a form that this server can't read; "
                "leave tools out or set tool_choice to 'none'",
                field="tools",
            )

    @property
    def plain(self) -> bool:
        """Whether the model's text is the message as it stands."""
        return self.thinking is None and self.calling.mode == "none"

    def parser(self) -> MessageParser:
        """A reader for the text of one choice."""
        thoughts = None if self.thinking is None else ThoughtParser(self.thinking, begun=self.begun)
        calls = None
        if self.calling.mode != "none" and self.dialect is not None:
            calls = CallParser(self.dialect, parallel=self.calling.parallel)
        return MessageParser(thoughts, calls)

    def structured_outputs(self, structure: Structure | None) -> Options | None:
        """What the model is held to, for ``SamplingParams``: the tools' schemas and the client's structure.

        Thoughts that the prompt has begun stay free. Calls that the model chooses to make are held to the schemas of
        the tools where one of these is ``strict``, or where the rest of the answer has a structure.

        Raises:
            RequestError: a schema makes no grammar.
        """
        element: Element | None = None
        field = "tools"
        strict = any(tool.function.strict for tool in self.calling.tools)
        if self.dialect is not None and self.calling.forced:
            element = self.dialect.forced(self.calling)
        elif self.dialect is not None and self.calling.mode == "auto" and structure is not None:
            element = {"type": "or", "elements": [self.dialect.forced(self.calling), structure.element]}
        elif self.dialect is not None and self.calling.mode == "auto" and strict:
            element = self.dialect.free(self.calling)
        elif structure is not None:
            if not self.begun:
                return structure.options
            element, field = structure.element, structure.field
        if element is None:
            return None
        if self.begun:
            thoughts: Element = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": END}
            element = sequence(thoughts, constant("\n\n"), element)
        return {"grammar": grammar_text(tagged(element), field)}


class MessageParser:
    """Reads one choice's text as thoughts, content and calls; see :class:`ThoughtParser` and :class:`CallParser`."""

    def __init__(self, thoughts: ThoughtParser | None, calls: CallParser | None) -> None:
        self._thoughts = thoughts
        self._calls = calls

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str, *, last: bool) -> list[Part]:
        """Take in more text; with the ``last`` of it comes out all that was held back."""
        pieces = [(False, text)]
        if self._thoughts is not None:
            pieces = self._thoughts.push(text) + (self._thoughts.finish() if last else [])
        parts: list[Part] = []
        for is_thought, piece in pieces:
            if is_thought:
                parts.append(Thought(piece))
            elif self._calls is not None:
                parts += self._calls.push(piece)
            elif piece:
                parts.append(Content(piece))
        if last and self._calls is not None:
            parts += self._calls.finish()
        return parts
