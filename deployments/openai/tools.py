"""The tools that a client offers, and which of them the model may, must or must not call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictStr, field_validator

from deployments.openai.fields import at_most
from engine.errors import RequestError

MAX_TOOLS = 128
"""OpenAI's limit."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # OpenAI's, and the dot that some clients put between server and tool


class Function(BaseModel):
    """A function that the model may call."""

    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, an object; none takes no arguments."""
    strict: StrictBool | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no name of a function; use 1 to 64 of A-Z a-z 0-9 _ . -")
        return name


def _function_tool(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "function":
        raise ValueError(f"a tool is of type {kind!r:.80}; only 'function' is supported")
    return value


class Tool(BaseModel):
    """One entry of ``tools``."""

    type: Literal["function"]
    function: Function

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        return self.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}

    def for_template(self) -> dict[str, Any]:
        """The tool as models have seen tools in training."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


Tools = Annotated[list[Annotated[Tool, BeforeValidator(_function_tool)]], at_most(MAX_TOOLS)]


class NamedFunction(BaseModel):
    """The name in a ``tool_choice``."""

    name: StrictStr


class NamedTool(BaseModel):
    """``tool_choice`` for one tool."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], at_most(MAX_TOOLS), Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    """``tool_choice`` for some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


@dataclass(frozen=True, slots=True)
class Calling:
    """What of the tools there is for this answer.

    Attributes:
        tools: those in the prompt; empty where the model is not to know of any.
        mode: "auto": the model decides; "required": it calls at least one; "named": it calls this one, once.
        parallel: it may call several at once.
    """

    tools: Sequence[Tool] = ()
    mode: Literal["none", "auto", "required", "named"] = "none"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the answer is nothing but calls."""
        return self.mode in ("required", "named")

    @classmethod
    def of(cls, tools: Sequence[Tool] | None, choice: ToolChoice | None, *, parallel: bool | None) -> Self:
        """Settle the fields ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

        Raises:
            RequestError: they contradict one another.
        """
        tools = tools or ()
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"tools has two functions called {double!r}; names must differ", field="tools")
        if choice == "none" or (not tools and choice in (None, "auto")):
            return cls()
        if not tools:
            raise RequestError("tool_choice asks for a tool and tools has none; send tools too", field="tool_choice")
        mode: Literal["auto", "required", "named"] = "auto"
        match choice:
            case "required":
                mode = "required"
            case NamedTool(function=function):
                tools, mode, parallel = _chosen(tools, [function.name]), "named", False
            case AllowedToolsChoice(allowed_tools=allowed):
                tools, mode = _chosen(tools, [tool.function.name for tool in allowed.tools]), allowed.mode
        return cls(tools, mode, parallel is not False)


def _chosen(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
    for name in names:
        if all(tool.name != name for tool in tools):
            raise RequestError(f"tool_choice names {name!r:.80}, which is not among the tools", field="tool_choice")
    return [tool for tool in tools if tool.name in names]
