"""Text that arrives in pieces is the text that arrives at once, cut where a search in all of it would cut."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.messages import FinishReason, TokenDelta, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.text.stream import TextStream

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \naaabé你🎉"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("aab é你🎉\ufffd"), min_size=1, max_size=5), max_size=4)
EOS = 2


def delta(token_ids, **options):
    return TokenDelta("r", token_ids, **options)


def split(ids, cuts):
    borders = sorted({cut % (len(ids) + 1) for cut in cuts} | {0, len(ids)})
    return [ids[a:b] for a, b in itertools.pairwise(borders)] or [[]]


def stream_all(tokenizer, ids, params, cuts=(), *, reason=FinishReason.LENGTH):
    """Every delta that the stream gives until it ends."""
    stream = TextStream(tokenizer, params)
    parts = split(ids, cuts)
    found = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        found.append(stream.push(delta(part, finish_reason=reason if last else None)))
        if found[-1].finish_reason is not None:
            break
    assert stream.finished
    assert found[-1].finish_reason is not None
    return found, stream


def reference(tokenizer, ids, params):
    """(text, stop string, tokens that count), by decoding longer and longer beginnings and searching all of each."""
    whole = tokenizer.decode(ids, continuation=True)
    best = None
    lengths = [stable_length(tokenizer, ids[:count]) for count in range(len(ids))] + [len(whole)]
    for stop in params.stop:
        start = whole.find(stop)
        while start >= 0:
            end = start + len(stop)
            count = next(n for n, length in enumerate(lengths) if length >= end)
            if count >= params.min_tokens:
                if best is None or (end, start) < best[:2]:
                    best = (end, start, stop, count)
                break
            start = whole.find(stop, start + 1)
    if best is None:
        return whole, None, len(ids)
    end, start, stop, count = best
    return whole[: end if params.include_stop_str_in_output else start], stop, count


def stable_length(tokenizer, ids):
    """Characters that no further byte can change."""
    data = b"".join(map(tokenizer.token_bytes, ids))
    for missing in range(min(4, len(data) + 1)):
        tail = data[len(data) - missing :]
        if missing == 0 or is_beginning(tail):
            complete = data[: len(data) - missing]
            if not any(is_beginning(data[len(data) - more :]) for more in range(missing + 1, min(4, len(data) + 1))):
                return len(complete.decode("utf-8", errors="replace"))
    raise AssertionError


def is_beginning(data):
    """Whether the bytes are the beginning of a character and not all of it."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False


@settings(deadline=None, max_examples=60)
@given(text=TEXT, cuts=st.lists(st.integers(0, 1000), max_size=12))
@example(text="🎉🎉", cuts=list(range(20)))
def test_deltas_joined_are_the_text(any_tokenizer, text, cuts):
    ids = any_tokenizer.encode(text)
    found, stream = stream_all(any_tokenizer, ids, SamplingParams(), cuts)
    joined = "".join(part.text for part in found)
    assert joined == any_tokenizer.decode(ids, continuation=True)
    assert joined.replace("\u2581", " ") in (text.replace("\u2581", " "), " " + text.replace("\u2581", " "))
    assert [token for part in found for token in part.token_ids] == ids
    assert stream.num_tokens == len(ids)
    assert found[-1].finish_reason is FinishReason.LENGTH
    # Never half a character, and no replacement for one that was only late.
    assert text.count("\ufffd") == joined.count("\ufffd")


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 419), max_size=25), cuts=st.lists(st.integers(0, 1000), max_size=12))
def test_any_tokens_in_any_pieces_give_the_one_shot_text(plain_tokenizer, ids, cuts):
    found, _ = stream_all(plain_tokenizer, ids, SamplingParams(), cuts)
    assert "".join(part.text for part in found) == plain_tokenizer.decode(ids, continuation=True)


@settings(deadline=None, max_examples=300)
@given(
    text=TEXT,
    stop=STOPS,
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
    data=st.data(),
)
def test_stop_strings_cut_where_a_search_in_the_whole_text_would(
    plain_tokenizer, text, stop, cuts, include, min_tokens, data
):
    if text and data.draw(st.booleans()):  # a stop string that is there
        start = data.draw(st.integers(0, len(text) - 1))
        stop = [*stop, text[start : start + 4]]
    ids = plain_tokenizer.encode(text)
    if ids and data.draw(st.booleans()):  # broken characters
        ids = ids[: data.draw(st.integers(0, len(ids)))]
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    expected_text, expected_stop, expected_count = reference(plain_tokenizer, ids, params)
    found, stream = stream_all(plain_tokenizer, ids, params, cuts)
    assert "".join(part.text for part in found) == expected_text
    assert found[-1].stop_reason == expected_stop
    assert found[-1].finish_reason is (FinishReason.LENGTH if expected_stop is None else FinishReason.STOP)
    assert sum(len(part.token_ids) for part in found) == stream.num_tokens == expected_count


def test_with_one_stop_string_the_text_ends_at_its_first_place(plain_tokenizer):
    text = "The answer is 42. The answer is 43."
    ids = plain_tokenizer.encode(text)
    for stop in ("42", "answer", ". T", "The", "er is 43."):
        params = SamplingParams(stop=stop)
        found, _ = stream_all(plain_tokenizer, ids, params, range(len(ids)))
        assert "".join(part.text for part in found) == text[: text.find(stop)]
        assert found[-1].stop_reason == stop


def test_text_is_held_only_while_it_may_become_a_stop_string(plain_tokenizer):
    stream = TextStream(plain_tokenizer, SamplingParams(stop=["###", "STOP"]))
    sent = [stream.push(delta(plain_tokenizer.encode(text))).text for text in ("a#", "#", "b", "ST", "OR", "E #")]
    assert sent == ["a", "", "##b", "", "STOR", "E "]
    assert stream.push(delta([EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS)).text == "#"


def test_a_character_is_held_until_it_is_whole(plain_tokenizer):
    stream = TextStream(plain_tokenizer, SamplingParams())
    ids = plain_tokenizer.encode("🎉")
    assert len(ids) == 4
    assert [stream.push(delta([token])).text for token in ids] == ["", "", "", "🎉"]
    assert stream.push(delta(ids[:2], finish_reason=FinishReason.LENGTH)).text == "\ufffd"


def test_of_two_stop_strings_the_one_complete_first_counts_and_then_the_longer(plain_tokenizer):
    ids = plain_tokenizer.encode("xxabcdef")
    for stop, expected in (
        (["abcdef", "cd"], ("xxab", "cd")),
        (["cd", "abcd"], ("xx", "abcd")),
        (["bcd", "cd"], ("xxa", "bcd")),
    ):
        found, _ = stream_all(plain_tokenizer, ids, SamplingParams(stop=stop))
        assert (found[-1].text, found[-1].stop_reason) == expected


def test_a_stop_string_counts_from_the_token_that_makes_min_tokens(plain_tokenizer):
    ids = [plain_tokenizer.encode(letter)[0] for letter in "abab" * 2]
    for min_tokens, count in ((0, 2), (2, 2), (3, 4), (4, 4), (5, 6)):
        found, stream = stream_all(plain_tokenizer, ids, SamplingParams(stop="ab", min_tokens=min_tokens), range(9))
        assert ("".join(part.text for part in found), stream.num_tokens) == ("abababab"[: count - 2], count)


def test_an_ignored_stop_string_may_overlap_one_that_counts(plain_tokenizer):
    ids = [plain_tokenizer.encode(letter)[0] for letter in "xaaaay"]
    found, stream = stream_all(plain_tokenizer, ids, SamplingParams(stop="aaa", min_tokens=5), range(9))
    assert ("".join(part.text for part in found), stream.num_tokens) == ("xa", 5)


def test_a_stop_token_is_counted_and_not_shown(plain_tokenizer):
    word = plain_tokenizer.encode("dog")
    stream = TextStream(plain_tokenizer, SamplingParams(stop_token_ids=[word[-1]]))
    last = stream.push(delta([*word, word[-1]], finish_reason=FinishReason.STOP, stop_token_id=word[-1]))
    assert (last.text, last.stop_reason, last.token_ids) == ("dog", word[-1], [*word, word[-1]])
    assert stream.num_tokens == len(word) + 1
    stream = TextStream(plain_tokenizer, SamplingParams())
    last = stream.push(delta([*word, EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert (last.text, last.stop_reason, last.finish_reason) == ("dog", None, FinishReason.STOP)


def test_a_stop_string_beats_the_end_by_length(plain_tokenizer):
    stream = TextStream(plain_tokenizer, SamplingParams(stop=["fox"], max_tokens=50))
    last = stream.push(delta(plain_tokenizer.encode("brown fox jumps"), finish_reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason, last.stop_reason) == ("brown ", FinishReason.STOP, "fox")
    assert stream.push(delta([5])) == stream.finish()  # nothing comes after the end


def test_special_tokens_are_not_shown(plain_tokenizer):
    begin = plain_tokenizer.token_id("<|begin_of_sentence|>")
    ids = [begin, *plain_tokenizer.encode("a"), 1, begin, *plain_tokenizer.encode("b")]
    found, _ = stream_all(plain_tokenizer, ids, SamplingParams(), range(10))
    assert "".join(part.text for part in found) == "ab"


def test_finish_from_outside_gives_what_was_held(plain_tokenizer):
    stream = TextStream(plain_tokenizer, SamplingParams(stop=["###"]))
    stream.push(delta([*plain_tokenizer.encode("a##"), plain_tokenizer.encode("🎉")[0]]))
    last = stream.finish()
    assert (last.text, last.finish_reason) == ("##\ufffd", FinishReason.ABORT)
    assert stream.finished


def test_logprobs_are_named_as_openai_names_them(plain_tokenizer):
    party, word = plain_tokenizer.encode("🎉"), plain_tokenizer.encode("a")
    raw = [
        TokenLogprobs(party[0], -1.5, 2, {word[0]: -0.5, party[0]: -1.5}),
        TokenLogprobs(EOS, -0.25, 1, {EOS: -0.25}),
    ]
    stream = TextStream(plain_tokenizer, SamplingParams(logprobs=2))
    found = stream.push(
        delta([party[0], EOS], logprobs=raw, finish_reason=FinishReason.STOP, stop_token_id=EOS)
    ).logprobs
    assert [(p.token, p.token_bytes, p.logprob, p.rank) for p in found] == [
        ("bytes:\\xf0", b"\xf0", -1.5, 2),
        ("</s>", b"</s>", -0.25, 1),
    ]
    assert [(t.token, t.logprob, t.rank) for t in found[0].top] == [("a", -0.5, 1), ("bytes:\\xf0", -1.5, 2)]


def test_logprobs_end_where_the_tokens_end(plain_tokenizer):
    ids = plain_tokenizer.encode("brown fox jumps over")
    raw = [TokenLogprobs(token, -1.0, 1) for token in ids]
    last = TextStream(plain_tokenizer, SamplingParams(stop="fox", logprobs=0)).push(delta(ids, logprobs=raw))
    assert len(last.logprobs) == len(last.token_ids) < len(ids)
    assert [entry.token_id for entry in last.logprobs] == last.token_ids


@pytest.mark.parametrize("stop", ["a" * 1000, "ab" * 500])
def test_long_repetitive_stop_strings_are_found_in_linear_time(plain_tokenizer, stop):
    ids = plain_tokenizer.encode("ab" * 200 + "a" * 5000 + stop + "tail")
    whole = plain_tokenizer.decode(ids)
    found, _ = stream_all(plain_tokenizer, ids, SamplingParams(stop=stop), range(0, len(ids), 3))
    assert "".join(part.text for part in found) == whole[: whole.find(stop)]
