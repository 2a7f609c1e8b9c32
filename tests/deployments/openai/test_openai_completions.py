"""Completions with the official client."""

from __future__ import annotations

import openai
import pytest
from http_server import NAME, Server

pytest_plugins = ("http_fixtures",)

PROMPT = "Once upon a time there was a"
LONG = {"ignore_eos": True}


def test_a_completion_has_16_tokens_by_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, extra_body=LONG)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 16
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.text


def test_text_and_token_ids_are_the_same_prompt(client: openai.OpenAI, server: Server) -> None:
    ids = server.tokenizer.encode(PROMPT)
    options = {"model": NAME, "seed": 4, "max_tokens": 10}
    text = client.completions.create(prompt=PROMPT, **options)
    tokens = client.completions.create(prompt=ids, **options)
    assert text.choices[0].text == tokens.choices[0].text
    assert text.usage.prompt_tokens == tokens.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_n_choices_each(client: openai.OpenAI, server: Server, as_ids: bool, stream: bool) -> None:
    prompts = [PROMPT, "The sun is", "Two boys"]
    ids = [server.tokenizer.encode(prompt) for prompt in prompts]
    options = {"model": NAME, "seed": 4, "max_tokens": 8, "extra_body": LONG}
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    given = ids if as_ids else prompts
    texts = [""] * 6
    if stream:
        usage = None
        for chunk in client.completions.create(
            prompt=given, n=2, stream=True, stream_options={"include_usage": True}, **options
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        answer = client.completions.create(prompt=given, n=2, **options)
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [choice.text for choice in answer.choices]
        usage = answer.usage
    assert texts[::2] == alone
    assert usage.prompt_tokens == sum(map(len, ids))
    assert usage.completion_tokens == 6 * 8


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_puts_the_prompt_first(client: openai.OpenAI, server: Server, as_ids: bool) -> None:
    prompt = server.tokenizer.encode(PROMPT) if as_ids else PROMPT
    options = {"model": NAME, "prompt": prompt, "seed": 4, "max_tokens": 8}
    plain = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, echo=True).choices[0].text == PROMPT + plain
    chunks = client.completions.create(**options, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


def test_a_concatenated_stream_is_the_whole_completion(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 50, "seed": 8}
    whole = client.completions.create(**options).choices[0]
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_logprobs_in_lists(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 9, "seed": 8, "extra_body": LONG}
    choice = client.completions.create(**options, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 9
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) in (3, 4)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or token.startswith("bytes:")
    offsets: list[int] = []
    for chunk in client.completions.create(**options, logprobs=3, stream=True):
        if chunk.choices[0].logprobs:
            offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == logprobs.text_offset
    chosen = client.completions.create(**options, logprobs=0).choices[0].logprobs
    assert chosen.token_logprobs == pytest.approx(logprobs.token_logprobs, abs=1e-3)


def test_best_of_n_is_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, n=2, best_of=2, max_tokens=1)
    assert len(answer.choices) == 2
