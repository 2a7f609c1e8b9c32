"""Chat completions with the official client."""

from __future__ import annotations

import asyncio

import openai
import pytest
from http_server import NAME, Server

pytest_plugins = ("http_fixtures",)

MESSAGES = [{"role": "user", "content": "Tell me a story about a little dog."}]
LONG = {"ignore_eos": True}


def test_an_answer_has_what_openai_promises(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12, seed=1, extra_body=LONG)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_the_prompt_is_the_chat_template(client: openai.OpenAI, server: Server) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Bye"},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    flat = [messages[0], {"role": "user", "content": "Hello \nthere"}, *messages[2:]]
    prompt = server.tokenizer.apply_chat_template(flat, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(server.tokenizer.encode(prompt, parse_special=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_concatenated_stream_is_the_whole_answer(client: openai.OpenAI, temperature: float) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 40, "seed": 5, "temperature": temperature}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole.choices[0].finish_reason


def test_the_default_length_is_the_rest_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, seed=1, extra_body=LONG)
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_max_completion_tokens_counts_before_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=3, max_tokens=9, extra_body=LONG
    )
    assert answer.usage.completion_tokens == 3


def test_include_usage_ends_the_stream_with_counts(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 7, "extra_body": LONG, "seed": 2}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    counts = whole.usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (counts.prompt_tokens, 7)
    without = list(client.chat.completions.create(**options, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "A quite particular prompt that is asked twice. " * 4}]
    counts = [client.chat.completions.create(model=NAME, messages=messages, max_tokens=2).usage for _ in range(2)]
    assert counts[0].prompt_tokens_details.cached_tokens < 16
    cached = counts[1].prompt_tokens_details.cached_tokens
    assert cached >= 16
    assert cached % 16 == 0
    assert cached < counts[1].prompt_tokens


def test_n_choices_are_different_and_the_first_is_that_of_one(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 24, "seed": 11}
    one = client.chat.completions.create(**options)
    three = client.chat.completions.create(**options, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs_of_every_token(client: openai.OpenAI, server: Server) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 10, "seed": 3, "extra_body": LONG}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 10
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 4
        ordered = [top.logprob for top in entry.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
        assert entry.logprob <= ordered[0]
        if entry.bytes is not None and not entry.token.startswith("bytes:"):
            assert bytes(entry.bytes).decode() == entry.token or entry.bytes == []
    special = {server.tokenizer.piece(token_id) for token_id in server.tokenizer.special_ids}
    shown = [bytes(entry.bytes) for entry in content if entry.token not in special]
    assert b"".join(shown).decode("utf-8", "replace").strip() == answer.choices[0].message.content.strip()
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, logprobs=True, top_logprobs=4, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-3)
    plain = client.chat.completions.create(**options, logprobs=True)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 10


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, server: Server, stream: bool) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 60, "temperature": 0, "extra_body": LONG}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[20:24]
    expected = text[: text.index(stop)]
    if stream:
        chunks = list(client.chat.completions.create(**options, stop=[stop, "never seen"], stream=True))
        found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options, stop=stop).choices[0]
        found, reason = choice.message.content, choice.finish_reason
    assert found == expected
    assert reason == "stop"
    server.wait_until_idle()
    options["extra_body"] = {**LONG, "include_stop_str_in_output": True}
    assert client.chat.completions.create(**options, stop=stop).choices[0].message.content == expected + stop


def test_sampling_options_reach_the_sampler(client: openai.OpenAI, server: Server) -> None:
    options = {"model": NAME, "messages": MESSAGES, "max_tokens": 5}
    (wanted,) = server.tokenizer.encode(" dog")[-1:]
    forced = client.chat.completions.create(
        **options, logit_bias={str(wanted): 100}, logprobs=True, extra_body=LONG, temperature=0
    )
    content = forced.choices[0].logprobs.content
    assert {bytes(entry.bytes) for entry in content} == {server.tokenizer.token_bytes(wanted)}
    greedy = client.chat.completions.create(**options, temperature=0).choices[0].message.content
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        answer = client.chat.completions.create(**options, temperature=2, extra_body=extra, seed=9)
        assert answer.choices[0].message.content == greedy
    stopped = client.chat.completions.create(
        **options, logit_bias={str(wanted): 100}, temperature=0, extra_body={"stop_token_ids": [wanted]}
    )
    assert stopped.choices[0].message.content == ""
    assert stopped.choices[0].finish_reason == "stop"
    least = client.chat.completions.create(
        **options,
        logit_bias={str(wanted): 100},
        temperature=0,
        extra_body={"stop_token_ids": [wanted], "min_tokens": 2},
    )
    assert least.usage.completion_tokens == 3


def test_many_at_once_give_what_each_gives_alone(server: Server) -> None:
    """More streams than ``max_num_seqs``, through the async client."""

    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=20, seed=seed, stream=True, extra_body=LONG
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*[ask(client, seed) for seed in range(24)])
            alone = [await ask(client, seed) for seed in range(3)]
            assert list(together[:3]) == alone

    asyncio.run(run())
