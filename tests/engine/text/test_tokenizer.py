"""Tokenizers of every kind: plain text stays plain, special tokens are special, bytes add up to the text."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, RequestError, UnsupportedError
from engine.text.pieces import make_control
from engine.tokenizer import Tokenizer

BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n<|>_aé你🎉"), max_size=60)
TINY = Path(__file__).parents[3] / "examples" / "ernie-tiny" / "bf16"


@settings(deadline=None, max_examples=60)
@given(text=TEXT)
@example(text="")
@example(text=" leading, and  double\n\n   spaces ")
@example(text=f"a{END}b</s><unk><s><0x41>")
@example(text="\x00\ufeff\ufffd\u2028")
def test_plain_text_comes_back_and_holds_no_special_token(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert not any_tokenizer.special_ids & set(ids)
    # U+2581 is SentencePiece's own space.
    assert any_tokenizer.decode(ids).replace("\u2581", " ") == text.replace("\u2581", " ")


def test_special_tokens_are_read_where_asked_for(any_tokenizer):
    begin, end = any_tokenizer.token_id(BEGIN), any_tokenizer.token_id(END)
    ids = any_tokenizer.encode(f"{BEGIN}Hello{END}{END}", parse_special=True)
    assert [ids[0], *ids[-2:]] == [begin, end, end]
    assert ids[1:-2] == any_tokenizer.encode("Hello")
    assert {begin, end} <= any_tokenizer.special_ids
    assert any_tokenizer.token_bytes(end) == b""
    assert any_tokenizer.piece(end) == END
    assert any_tokenizer.token_text(end) == (END, END.encode())


def test_eos_ids_are_found_by_name_and_in_the_files(folders, tmp_path):
    tokenizer = Tokenizer.from_folder(folders["plain"])
    assert tokenizer.eos_token_ids == (2, 421)
    for path in folders["plain"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 99999]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (2, 7, 8, 421)


def test_used_vocabulary_ends_at_the_last_added_token(tokenizer_of):
    assert tokenizer_of("plain").used_vocab_size == 422
    assert tokenizer_of("user_defined").used_vocab_size == 420
    for token_id in (-1, 422, 10**9):
        assert tokenizer_of("plain").token_bytes(token_id) == b""
        assert tokenizer_of("plain").piece(token_id) == ""


def test_special_tokens_that_the_model_file_would_match_are_made_unmatchable(folders):
    # What the file itself would do with a user's text:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["user_defined"] / "tokenizer.model"))
    special = processor.piece_to_id(END)
    assert special in processor.encode(f"a{END}")
    # What Dibit does is in test_plain_text_comes_back…; apart from that, nothing about the model is different.
    changed = sentencepiece.SentencePieceProcessor(
        model_proto=make_control(processor.serialized_model_proto(), [END, BEGIN])
    )
    assert changed.is_control(special)
    text = "The answer is <|other|> 42: größe 🎉"
    assert changed.encode(text) == processor.encode(text)
    assert changed.get_piece_size() == processor.get_piece_size()


def test_decoding_agrees_with_the_libraries(folders, tokenizer_of):
    text = " The answer ist größe  你好\n    🎉"
    for kind in ("plain", "dummy_prefix", "user_defined"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
        assert tokenizer_of(kind).encode(text) == processor.encode(text)
        assert tokenizer_of(kind).decode(processor.encode(text)) == processor.decode(processor.encode(text)) == text
    for kind in ("metaspace_json", "byte_level_json"):
        library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer_of(kind).encode(text) == ids
        assert tokenizer_of(kind).decode(ids) == library.decode(ids) == text
        marked = f"{BEGIN}Hello{END}"
        assert tokenizer_of(kind).encode(marked, parse_special=True) == library.encode(marked).ids


def test_a_continuation_keeps_its_leading_space(any_tokenizer):
    prompt, continuation = "The answer", " is 42"
    ids = any_tokenizer.encode(prompt + continuation)
    at = next(i for i in range(len(ids)) if any_tokenizer.decode(ids[:i]) == prompt)
    assert any_tokenizer.decode(ids[at:], continuation=True) == continuation


def test_invalid_utf8_becomes_replacement_characters(plain_tokenizer):
    first_byte = next(i for i in range(400) if plain_tokenizer.piece(i) == "<0x00>")
    ids = [first_byte + byte for byte in b"a\xe4\xbd\xff\xe4\xbd\xa0\xf0\x9f"]
    assert plain_tokenizer.decode(ids) == "a\ufffd\ufffd你\ufffd"
    assert plain_tokenizer.token_text(first_byte + 0xE4) == ("bytes:\\xe4", b"\xe4")


def test_half_a_surrogate_pair_is_refused_by_name(plain_tokenizer):
    with pytest.raises(RequestError, match=r"U\+D83C") as caught:
        plain_tokenizer.encode("party \ud83c")
    assert caught.value.field == "prompt"
    with pytest.raises(RequestError) as caught:
        plain_tokenizer.encode_chat([{"role": "user", "content": "\udf89"}])
    assert caught.value.field == "messages"


def test_ordinary_added_tokens_are_text(folders, tokenizer_of):
    tokenizer = tokenizer_of("byte_level_json")
    tool = tokenizer.token_id("<tool>")
    assert tool in tokenizer.encode("a<tool>b")
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"


def test_stripping_tokens_take_white_space_along(folders, tmp_path):
    for path in folders["plain"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["422"] = {"content": "<mask>", "special": True, "lstrip": True}
    config["added_tokens_decoder"]["423"] = {"content": "<next>", "special": True, "rstrip": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("a  <mask> b <next>  c", parse_special=True)
    assert ids == [*tokenizer.encode("a"), 422, *tokenizer.encode(" b "), 423, *tokenizer.encode("c")]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ConfigError, "neither tokenizer.model nor tokenizer.json"),
        ({"tokenizer.model": "nonsense"}, ConfigError, "not a SentencePiece model"),
        ({"tokenizer.json": "{}"}, ConfigError, "not a tokenizer.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, ConfigError, "not valid JSON"),
        ({"tokenizer_config.json": "[]"}, ConfigError, "expected an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, ConfigError, "added_tokens_decoder"),
        (
            {"tokenizer.json": tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str()},
            UnsupportedError,
            "ByteLevel",
        ),
    ],
)
def test_broken_folders_are_named(tmp_path, files, error, message):
    for name, value in files.items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(error, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.skipif(not (TINY / "tokenizer.model").is_file(), reason="the example model is not there")
def test_the_example_model_has_ernies_ids():
    tokenizer = Tokenizer.from_folder(TINY)
    assert tokenizer.encode("0123456789") == list(range(3, 13))
    assert [tokenizer.token_bytes(13 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.eos_token_ids == (2, tokenizer.token_id(END))
    assert tokenizer.used_vocab_size == 8002
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == tokenizer.token_id(BEGIN)
    assert tokenizer.decode(chat) == "User: Hi\nAssistant: "
