"""What an answer must look like: ``response_format`` and its many elder relatives, as one thing.

Everything ends up in ``SamplingParams.structured_outputs``. Where a constraint holds for a part of the answer only
(behind the thinking, inside a tool call), the whole is written as a structural tag of xgrammar
(https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html), whose grammar goes to the engine as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from deployments.openai.fields import at_most
from engine.errors import RequestError
from engine.sampling_params import MAX_SCHEMA_DEPTH
from engine.structured.compiler import MAX_WHITESPACE

MAX_CHOICES = 4096
"""Strings to choose from."""

Element = dict[str, Any]
"""A format of a structural tag."""

Options = dict[str, Any]
"""``SamplingParams.structured_outputs`` before it is validated."""

Schema = dict[str, Any] | StrictStr
Choices = Annotated[list[StrictStr], at_most(MAX_CHOICES), Field(min_length=1)]


class JsonSchema(BaseModel):
    """``response_format.json_schema``. ``strict`` or not, the answer follows the schema."""

    name: StrictStr
    description: StrictStr | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """``response_format``; a structural tag has its ``format``, or ``structures`` and ``triggers``, beside ``type``."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``: one of these."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = None
    structural_tag: Schema | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """A constraint on an answer, and the request field that asked for it.

    ``kind`` is one of ``json`` (a schema), ``json_object`` (True), ``regex``, ``choice`` (strings), ``grammar`` (EBNF
    as xgrammar reads it), ``structural_tag``; ``value`` is what stands under that name.
    """

    kind: str
    value: Any
    field: str

    @property
    def options(self) -> Options:
        """For ``SamplingParams.structured_outputs``."""
        if self.kind == "structural_tag":
            return {"grammar": grammar_text(self.value, self.field)}
        return {self.kind: self.value}

    @property
    def element(self) -> Element:
        """As a part of a structural tag."""
        match self.kind:
            case "json":
                return json_element(self.value)
            case "json_object":
                return json_element({"type": "object"})
            case "regex":
                return {"type": "regex", "pattern": self.value}
            case "choice":
                return {"type": "or", "elements": [constant(choice) for choice in self.value]}
            case "structural_tag" if "format" in self.value:
                return dict(self.value["format"])
            case "structural_tag":
                return {"type": "grammar", "grammar": grammar_text(self.value, self.field)}
            case _:
                return {"type": "grammar", "grammar": self.value}


def json_element(schema: dict[str, Any], *, max_whitespace: int = MAX_WHITESPACE) -> Element:
    """JSON that fits a schema, with at most so many characters of white space between its parts."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": max_whitespace}


def constant(text: str) -> Element:
    """Exactly this text."""
    return {"type": "const_string", "value": text}


def sequence(*elements: Element) -> Element:
    """One after the other."""
    return {"type": "sequence", "elements": list(elements)}


def tagged(format_: Element) -> dict[str, Any]:
    """A structural tag around its format."""
    return {"type": "structural_tag", "format": format_}


def grammar_text(structural_tag: dict[str, Any], field: str) -> str:
    """The grammar of a structural tag, in EBNF.

    Raises:
        RequestError: the tag, or a schema in it, is malformed or asks for what xgrammar doesn't have.
    """
    import xgrammar  # takes seconds, which nobody who asks for plain text should wait for

    _check_depth(structural_tag, field)
    try:
        return str(xgrammar.Grammar.from_structural_tag({"type": "structural_tag", **structural_tag}))
    except (RuntimeError, ValueError, TypeError) as error:  # pydantic's are ValueErrors
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RequestError(f"{field} makes no grammar: {first:.500}", field=field) from None


def _check_depth(value: Any, field: str) -> None:
    """XGrammar reads what is nested by recursion, in C++, where too deep means the end of the process."""
    level = [value]
    for _ in range(2 * MAX_SCHEMA_DEPTH):
        inner = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in inner if isinstance(one, (dict, list))]
    if level:
        raise RequestError(f"{field} is nested too deeply", field=field)


def structure_of(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    guided: dict[str, Any],
) -> Structure | None:
    """The one constraint that a request asks for, wherever it does.

    Args:
        guided: values of the older fields (``guided_json``, ..., ``structural_tag``) by their names.

    Raises:
        RequestError: there are several, or one lacks what it needs.
    """
    found = [*_of_response_format(response_format)]
    if structured_outputs is not None:
        asked = structured_outputs.model_dump(exclude_none=True, by_alias=True)
        found += [Structure(kind, value, "structured_outputs") for kind, value in asked.items() if value is not False]
    found += [
        Structure(_GUIDED[name], value, name) for name, value in guided.items() if value is not None and value != ""
    ]
    found = [structure for structure in found if structure.value is not False]
    if len(found) > 1:
        fields = ", ".join(f"{structure.field} ({structure.kind})" for structure in found)
        raise RequestError(
            f"the answer can follow one structure, and these ask for several: {fields}", field=found[1].field
        )
    return _parsed(found[0]) if found else None


_GUIDED = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
}


def _of_response_format(form: ResponseFormat | None) -> Sequence[Structure]:
    if form is None or form.type == "text":
        return ()
    if form.type == "json_object":
        return (Structure("json_object", True, "response_format"),)
    if form.type == "structural_tag":
        return (Structure("structural_tag", dict(form.model_extra or {}), "response_format"),)
    if form.json_schema is None:
        raise RequestError("response_format of type 'json_schema' needs a json_schema", field="response_format")
    return (Structure("json", form.json_schema.json_schema, "response_format"),)


def _parsed(structure: Structure) -> Structure:
    """Schemas and tags may come as JSON text."""
    if structure.kind not in ("json", "structural_tag") or not isinstance(structure.value, str):
        return structure
    try:
        value = json.loads(structure.value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{structure.field} is not valid JSON: {error}", field=structure.field) from None
    if not isinstance(value, dict):
        raise RequestError(f"{structure.field} must be a JSON object", field=structure.field)
    return Structure(structure.kind, value, structure.field)
