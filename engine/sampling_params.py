"""How the next token is chosen, validated once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import ConfigError, RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_LENGTH = 1 << 17
"""Characters of a schema, regex or grammar, and of all choices together."""
MAX_SCHEMA_DEPTH = 64

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What :func:`default_sampling` reads."""


def _listed(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class StructuredOutputs(BaseModel):
    """What form the text must have, under vLLM's names; exactly one of them, checked for size here.

    Whether a schema, regex or grammar is one that :mod:`engine.structured` understands, its compiler says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    json_schema: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    """A JSON Schema, or its text: the text is JSON that fits it."""
    json_object: bool | None = None
    """True: the text is a JSON object, of whatever content."""
    regex: str | None = None
    """The whole text matches."""
    choice: list[str] | None = Field(default=None, min_length=1)
    """The text is one of these."""
    grammar: str | None = None
    """The text is a sentence of this grammar, whose start is ``root`` (GBNF, as llama.cpp and XGrammar write it)."""

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        given = [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            named = ", ".join(given).replace("json_schema", "json") or "none"
            raise ValueError(f"exactly one of json, json_object, regex, choice and grammar is needed (found {named})")
        if self.json_schema is not None:
            _check_schema(self.json_schema)
        if self.choice is not None and not all(self.choice):
            raise ValueError("a choice must not be empty")
        if len(self.source) > MAX_GRAMMAR_LENGTH:
            raise ValueError(f"it has {len(self.source)} characters; at most {MAX_GRAMMAR_LENGTH} are allowed")
        try:
            self.source.encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair; send whole Unicode characters") from None
        return self

    @property
    def kind(self) -> str:
        """Which one is given, by its name in a request: "json", "json_object", "regex", "choice" or "grammar"."""
        if self.json_schema is not None:
            return "json"
        if self.json_object:
            return "json_object"
        return "regex" if self.regex is not None else "choice" if self.choice is not None else "grammar"

    @property
    def source(self) -> str:
        """What is given as text; together with :attr:`kind` it says all."""
        if self.json_schema is not None:
            return self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
        if self.choice is not None:
            return json.dumps(self.choice, ensure_ascii=False)
        return self.regex or self.grammar or ""


def _check_schema(schema: dict[str, Any] | bool | str) -> None:
    """Refuse what is not JSON, and what is nested so deeply that it would not be read."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json is a text that is not valid JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise ValueError(f"json holds a JSON {type(value).__name__}; a schema is an object")
    level: list[Any] = [value] if isinstance(value, dict) else []
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in inner if isinstance(one, (dict, list))]
    if level:
        raise ValueError(f"json is nested more than {MAX_SCHEMA_DEPTH} levels deep")


class SamplingParams(BaseModel):
    """Sampling options under OpenAI's and vLLM's names; frozen, and wrong ones can't be made.

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 means all tokens. ``seed`` None draws one. ``logprobs`` is the number
    of most likely tokens to report at each position (0: only the chosen one; None: no log probabilities at all);
    ``prompt_logprobs`` is the same for the prompt, whose cached prefix is computed again for it.
    Noise is a pure function of (seed, position, token), so equal requests with equal seeds give equal tokens.
    ``min_tokens`` holds off EOS, ``stop_token_ids`` and ``stop`` strings until that many tokens exist.
    ``structured_outputs`` allows no token that leaves its form, and EOS only where the form may end; where it must end,
    it does so whatever ``min_tokens`` and ``ignore_eos`` say.
    What each option does to the logits, and in which order: :mod:`engine.execution.sampler`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_k: int = Field(default=0, ge=-1)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIAS
    )
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        for text in stop:
            if not text:
                raise ValueError("a stop string must not be empty")
            if len(text) > MAX_STOP_LENGTH:
                raise ValueError(f"a stop string has {len(text)} characters; at most {MAX_STOP_LENGTH} are allowed")
        return stop

    @model_validator(mode="after")
    def _check_lengths(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        return self

    @classmethod
    def parse(cls, **options: Any) -> SamplingParams:
        """Make parameters from untrusted options.

        Raises:
            RequestError: an option is unknown or out of range; ``field`` names it.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # the options contradict one another
                raise RequestError(message, field="min_tokens") from None
            name = ".".join(map(str, first["loc"][:2] if first["loc"][0] == "structured_outputs" else first["loc"][:1]))
            if first["type"] == "value_error" and name == "structured_outputs":
                raise RequestError(f"{name}: {message}", field=name) from None
            found = repr(first["input"])[:80]
            raise RequestError(f"{name}: {message} (found {found})", field=name) from None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def default_sampling(folder: str | Path) -> dict[str, Any]:
    """The sampling options that a model's makers recommend: those of ``SAMPLING_DEFAULTS`` in generation_config.json.

    For requests that leave them out. As vLLM does it, ``do_sample`` is not looked at: a folder that names no
    temperature gets the usual default.

    Returns:
        Options for :class:`SamplingParams`; empty where there is no such file.

    Raises:
        ConfigError: the file is not a JSON object, or an option is out of range.
    """
    path = Path(folder) / "generation_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}; expected an object")
    options = {name: raw[name] for name in SAMPLING_DEFAULTS if raw.get(name) is not None}
    try:
        params = SamplingParams.parse(**options)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None
    return {name: getattr(params, name) for name in options}
