"""Whatever allowed tokens are taken, the text has the form that was asked for."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import qwen2_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import Schema, schemas

from engine.errors import RequestError
from engine.sampling_params import MAX_GRAMMAR_LENGTH, SamplingParams, StructuredOutputs
from engine.structured.compiler import GrammarCompiler
from engine.structured.matcher import Matcher
from engine.tokenizer import Tokenizer

WAIT = 60.0


def spec(**options: Any) -> StructuredOutputs:
    return StructuredOutputs(**options)


def matcher(grammars: GrammarCompiler, wanted: StructuredOutputs, token_ids: list[int] | None = None) -> Matcher:
    return grammars.matcher(grammars.compile(wanted).result(timeout=WAIT), token_ids or [])


def tokens_of(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def walk(one: Matcher, tokenizer: Tokenizer, draw: random.Random) -> list[int]:
    """Tokens taken at random: long ones, or ends, rather than one character after the other."""
    taken: list[int] = []
    while not one.ended:
        words = one.allowed()
        assert words is not None
        allowed = tokens_of(words)
        assert not set(allowed) & (tokenizer.special_ids - set(tokenizer.eos_token_ids))
        assert max(allowed) < tokenizer.used_vocab_size
        ends = [token for token in allowed if token in tokenizer.eos_token_ids]
        token = draw.choice(ends if ends and draw.random() < 0.3 else draw.choices(allowed, k=3))
        assert one.accept(token)
        taken.append(token)
        assert len(taken) < 2000
    return taken


def text_of(taken: list[int], tokenizer: Tokenizer) -> str:
    return b"".join(map(tokenizer.token_bytes, taken[:-1])).decode("utf-8", errors="strict")


@settings(max_examples=60, deadline=None)
@given(schema=schemas, as_text=st.booleans(), seed=st.integers(0, 2**32))
def test_text_under_a_schema_parses_and_validates(
    grammars: GrammarCompiler, tokenizer: Tokenizer, schema: Schema, as_text: bool, seed: int
) -> None:
    wanted = spec(json=json.dumps(schema) if as_text else schema)
    taken = walk(matcher(grammars, wanted), tokenizer, random.Random(seed))
    jsonschema.validate(json.loads(text_of(taken, tokenizer)), schema)


@settings(max_examples=60, deadline=None)
@given(choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_text_is_one_of_the_choices_whatever_characters_they_hold(
    grammars: GrammarCompiler, tokenizer: Tokenizer, choices: list[str], seed: int
) -> None:
    taken = walk(matcher(grammars, spec(choice=choices)), tokenizer, random.Random(seed))
    assert text_of(taken, tokenizer) in choices


@settings(max_examples=30, deadline=None)
@given(choice=st.text(min_size=1, max_size=8))
def test_a_choice_is_the_text_itself(grammars: GrammarCompiler, tokenizer: Tokenizer, choice: str) -> None:
    one = matcher(grammars, spec(choice=[choice]))
    ids = tokenizer.encode("a" + choice)[len(tokenizer.encode("a")) :]
    if b"".join(map(tokenizer.token_bytes, ids)) == choice.encode():
        assert all(map(one.accept, ids))
        assert one.accept(tokenizer.eos_token_ids[0])
        assert one.ended


@pytest.mark.parametrize(
    ("regex", "seed"),
    [
        (regex, seed)
        for regex in (r"[a-c]{2,5}", r"\d{4}-\d{2}-\d{2}", r"(yes|no)!?", r"[äöü中]+x")
        for seed in range(4)
    ],
)
def test_text_matches_the_whole_regex(grammars: GrammarCompiler, tokenizer: Tokenizer, regex: str, seed: int) -> None:
    taken = walk(matcher(grammars, spec(regex=regex)), tokenizer, random.Random(seed))
    assert re.fullmatch(regex, text_of(taken, tokenizer))


def test_a_tokenizer_json_has_grammars_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(qwen2_tokenizer.write(tmp_path))
    compiler = GrammarCompiler.of(tokenizer, vocab_size=512)
    schema = {"type": "array", "items": {"enum": ["größe", "你好", "<|im_end|>", 7]}, "minItems": 1, "maxItems": 3}
    for seed in range(10):
        taken = walk(matcher(compiler, spec(json=schema)), tokenizer, random.Random(seed))
        jsonschema.validate(json.loads(text_of(taken, tokenizer)), schema)
    compiler.close()


def test_text_is_a_sentence_of_the_grammar(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    wanted = spec(grammar='root ::= "(" root ")" | "[" root "]" | "x"')
    for seed in range(5):
        text = text_of(walk(matcher(grammars, wanted), tokenizer, random.Random(seed)), tokenizer)
        while text != "x":
            assert text[0] + text[-1] in ("()", "[]")
            text = text[1:-1]


def test_any_object_is_an_object(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    one = matcher(grammars, spec(json_object=True))
    for token in tokenizer.encode('{"a": [1, {"b": null}], "ü": "x"}'):
        assert one.accept(token)
    assert one.accept(tokenizer.eos_token_ids[0])
    assert not matcher(grammars, spec(json_object=True)).accept(tokenizer.encode("[")[-1])


@settings(max_examples=30, deadline=None)
@given(data=st.data(), schema=schemas, seed=st.integers(0, 2**32))
def test_a_matcher_goes_on_from_any_token(
    grammars: GrammarCompiler, tokenizer: Tokenizer, data: st.DataObject, schema: Schema, seed: int
) -> None:
    wanted = spec(json=schema)
    taken = walk(matcher(grammars, wanted), tokenizer, random.Random(seed))
    at = data.draw(st.integers(0, len(taken) - 1))
    one, again = matcher(grammars, wanted), matcher(grammars, wanted, taken[:at])
    for token in taken[:at]:
        one.accept(token)
    for token in taken[at:]:
        assert np.array_equal(one.allowed(), again.allowed())
        assert one.accept(token)
        assert again.accept(token)
    assert again.ended
    with pytest.raises(RequestError, match="does not go on"):
        matcher(grammars, wanted, [*taken, taken[0]])


def test_unwelcome_tokens_are_left_out_unless_nothing_else_may_come(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    one = matcher(grammars, spec(regex="a{1,2}"))
    letter = {token for token in range(tokenizer.used_vocab_size) if tokenizer.token_bytes(token) == b"a"}
    a = min(letter)
    assert one.accept(a)
    everything, welcome = one.allowed(), one.allowed(unwelcome=tokenizer.eos_token_ids)
    assert set(tokens_of(everything)) == {*letter, *tokenizer.eos_token_ids}
    assert set(tokens_of(welcome)) == letter
    assert one.accept(a)
    assert set(tokens_of(one.allowed(unwelcome=[*tokenizer.eos_token_ids, 8191, -1]))) == set(tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {"json": {"type": "strin"}},
        {"json": {"$ref": "#/nothing"}},
        {"regex": "(a"},
        {"regex": "a{3,1}"},
        {"grammar": "root ::= x"},
        {"grammar": "nothing"},
    ],
)
def test_what_is_no_grammar_is_the_requests_error(grammars: GrammarCompiler, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"the {next(iter(options))} can't be used: [^\\[]") as refusal:
        grammars.compile(spec(**options)).result(timeout=WAIT)
    assert refusal.value.field == "structured_outputs"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regex": "a", "choice": ["a"]},
        {"json_object": False},
        {"json": "{"},
        {"json": "[]"},
        {"json": "[" * 100_000},
        {"json": {"a": json.loads("[" * 80 + "]" * 80)}},
        {"choice": []},
        {"choice": ["a", ""]},
        {"regex": "a" * (MAX_GRAMMAR_LENGTH + 1)},
        {"regex": "\ud83c"},
        {"jsn": {}},
    ],
)
def test_what_is_too_much_or_contradicts_itself_is_refused_at_the_door(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams.parse(structured_outputs=options)
    assert (refusal.value.field or "").startswith("structured_outputs")


def test_a_grammar_is_compiled_once_and_kept_as_long_as_there_is_room(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler.of(tokenizer, vocab_size=8192, cache_bytes=1)
    first = compiler.compile(spec(regex="a+"))
    same = compiler.compile(spec(regex="a+"))
    grammar = first.result(timeout=WAIT)
    assert same.result(timeout=WAIT) is grammar
    assert compiler.compile(spec(regex="a+")).result(timeout=WAIT) is grammar
    compiler.compile(spec(regex="b+")).result(timeout=WAIT)
    assert compiler.compile(spec(regex="a+")).result(timeout=WAIT) is not grammar
    compiler.close()


def test_a_model_without_eos_has_no_grammars(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler([b"a", b"b"], eos_token_ids=[7])
    with pytest.raises(RequestError, match="ends a text"):
        compiler.compile(spec(regex="a+")).result(timeout=WAIT)
    compiler.close()
