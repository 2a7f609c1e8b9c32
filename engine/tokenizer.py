"""Text to token ids and back, for one model folder.

Text from users is encoded plain: the name of a special token in it becomes ordinary pieces. Only a rendered chat
template, and prompts whose caller asks for it, have their special tokens recognised, and there too what a message
says stays plain (:mod:`engine.chat.template` explains how the two are told apart).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.chat.template import ERNIE_BEGIN, ChatTemplate, Message
from engine.errors import ConfigError, RequestError
from engine.text.vocabulary import HuggingFaceVocabulary, Vocabulary, load

END_NAMES = ("</s>", "<|end_of_sentence|>", "<|im_end|>")
"""Tokens that end a turn of ERNIE or Qwen2; whichever a model has are EOS besides those its files name."""

SHOWN_NAMES = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
"""Tokens that structure an answer. They are text even where a model's files call them special, since whoever tells
thoughts, calls and answer apart, or makes a grammar of them, must see them."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the learned pieces. A special one is never made from plain text, and hardly ever shown."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer:
    """The tokenizer of a model.

    Attributes:
        used_vocab_size: one more than the highest id that has a token; the embedding table may be larger (padding).
        eos_token_ids: ids that end a generation.
        special_ids: ids of special tokens; all but :data:`SHOWN_NAMES` add nothing to the text.
        chat_template: the repository's, or ERNIE-4.5's own format for a vocabulary of ERNIE's.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        added: Mapping[int, AddedToken],
        eos_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        size = max(len(vocabulary.pieces), max(added, default=-1) + 1)
        self._pieces = vocabulary.pieces + [""] * (size - len(vocabulary.pieces))
        self._bytes = vocabulary.token_bytes + [b""] * (size - len(vocabulary.pieces))
        for id_, token in added.items():
            self._pieces[id_] = token.content
            self._bytes[id_] = b"" if token.special and token.content not in SHOWN_NAMES else token.content.encode()
        self._added = dict(added)
        self._added_ids = {token.content: id_ for id_, token in added.items()}
        self._ordinary = _pattern(token for token in added.values() if not token.special)
        self._any_added = _pattern(added.values())
        self._special_names = [token.content for token in added.values() if token.special]
        self.used_vocab_size = size
        named = (self._added_ids[name] for name in END_NAMES if name in self._added_ids)
        self.eos_token_ids = tuple(sorted({id_ for id_ in (*eos_token_ids, *named) if 0 <= id_ < size}))
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.chat_template = chat_template or ChatTemplate()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.model` (or `tokenizer.json`) and the JSON files beside it.

        Raises:
            ConfigError: a file is missing or malformed.
            UnsupportedError: a kind of `tokenizer.json` that is not supported.
        """
        folder = Path(folder)
        config = _json(folder / "tokenizer_config.json")
        added_ids = _json(folder / "added_tokens.json")
        special_map = _json(folder / "special_tokens_map.json")
        roles = {
            name: content
            for name, value in {**special_map, **config}.items()
            if name.endswith("_token") and (content := _content(value))
        }
        more = [*(special_map.get("additional_special_tokens") or []), *(config.get("additional_special_tokens") or [])]
        special = {*roles.values(), *(content for content in map(_content, more) if content)}
        added: dict[int, AddedToken] = {
            id_: AddedToken(content, special=content in special)
            for content, id_ in added_ids.items()
            if isinstance(id_, int) and id_ >= 0
        }
        for id_text, entry in (config.get("added_tokens_decoder") or {}).items():
            content = _content(entry)
            if not (id_text.isascii() and id_text.isdecimal() and content):
                raise ConfigError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{id_text!r}] is {entry!r}")
            added[int(id_text)] = AddedToken(
                content,
                special=bool(entry.get("special")) or content in special,
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
            )
        vocabulary = load(folder, {token.content for token in added.values() if token.special} | special)
        if isinstance(vocabulary, HuggingFaceVocabulary):
            for id_, token in vocabulary.added.items():
                added.setdefault(id_, AddedToken(token.content, token.special, token.lstrip, token.rstrip))
        known = {token.content for token in added.values()}
        for id_, piece in enumerate(vocabulary.pieces):
            if piece in special and piece not in known:  # named as special, and a piece of the vocabulary itself
                added[id_] = AddedToken(piece, special=True)
        return cls(
            vocabulary,
            added=added,
            eos_token_ids=_eos_ids(folder, roles.get("eos_token"), {t.content: i for i, t in added.items()}),
            chat_template=ChatTemplate.from_folder(
                folder, config, special_tokens=roles, ernie=ERNIE_BEGIN in known or ERNIE_BEGIN in vocabulary.pieces
            ),
        )

    def encode(self, text: str, *, parse_special: bool = False, field: str = "prompt") -> list[int]:
        """Token ids of ``text``; nothing is added to it.

        Args:
            parse_special: recognise names of special tokens in the text. Never for text that a user controls.
            field: the request field to blame.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        check_text(text, field)
        ids: list[int] = []
        for plain, token_id in self._split(text, self._any_added if parse_special else self._ordinary):
            if plain:
                ids += self._vocabulary.encode(plain)
            if token_id is not None:
                ids.append(token_id)
        return ids

    def _split(self, text: str, pattern: re.Pattern[str] | None) -> Iterator[tuple[str, int | None]]:
        """Plain text and the added token after it, in turn; None after the last text."""
        end = 0
        for match in () if pattern is None else pattern.finditer(text):
            token_id = self._added_ids[match[0]]
            plain = text[end : match.start()]
            yield plain.rstrip() if self._added[token_id].lstrip else plain, token_id
            end = match.end()
            if self._added[token_id].rstrip:
                end = len(text) - len(text[end:].lstrip())
        yield text[end:], None

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as one string, for people to read; :meth:`encode_chat` gives its tokens safely.

        Raises:
            RequestError: the template refuses the messages.
        """
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of the conversation: the template's special tokens are tokens, what messages say is plain text.

        Args:
            variables: more variables for the template (``tools``, ``enable_thinking``, …).

        Raises:
            RequestError: the template refuses the messages, or one holds half of a surrogate pair.
        """
        guarded, guard = self.chat_template.render_guarded(
            messages, self._special_names, add_generation_prompt=add_generation_prompt, **variables
        )
        check_text(guarded, "messages")
        ids: list[int] = []
        for plain, token_id in self._split(guarded, self._any_added):
            ids += self.encode(plain.replace(guard, ""))
            if token_id is not None:
                ids.append(token_id)
        return ids

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of the ids; special tokens are left out, and invalid UTF-8 becomes U+FFFD.

        Args:
            continuation: the ids go on after others. Otherwise they are a whole text, from which the space that
                some SentencePiece models put before every text is taken off.
        """
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text[1:] if self._vocabulary.dummy_prefix and not continuation and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text: UTF-8, possibly part of a character; empty for special tokens."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """The token as log probabilities name it, and its bytes.

        As OpenAI does it: a token that is part of a character is called ``bytes:\\xe2\\x82``. Special tokens, which
        have no text, go by their name.
        """
        data = self.token_bytes(token_id) or self.piece(token_id).encode()
        try:
            return data.decode("utf-8"), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def piece(self, token_id: int) -> str:
        """The vocabulary's name of the token; empty for an id without one."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""

    def token_id(self, piece: str) -> int | None:
        """Id of the added token called ``piece``, special tokens among them; None where there is none."""
        return self._added_ids.get(piece)


def check_text(text: str, field: str) -> None:
    """Refuse text that UTF-8 can't write.

    Raises:
        RequestError: there is half of a surrogate pair in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{field} has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "send whole Unicode characters",
            field=field,
        ) from None


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    names = sorted((token.content for token in tokens), key=len, reverse=True)  # the longest match wins
    return re.compile("|".join(map(re.escape, names))) if names else None


def _eos_ids(folder: Path, eos_token: str | None, added_ids: Mapping[str, int]) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        found.update(id_ for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int))
    if eos_token is not None and eos_token in added_ids:
        found.add(added_ids[eos_token])
    return found


def _content(value: object) -> str | None:
    """A token's name in tokenizer files: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value
