"""docs/api.md lists every field, and says of each what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from deployments.openai.requests.chat import ChatRequest
from deployments.openai.requests.completion import CompletionRequest
from deployments.openai.requests.unsupported import IGNORED, REFUSED

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text(encoding="utf-8")


def table(section: str) -> dict[str, str]:
    """Field to the word in its second column, of the table under a heading."""
    found = re.search(rf"^### {section}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/api.md has no section {section!r}"
    rows = re.findall(r"^\| (`.*?) \| (\w+) \|", found[1], re.MULTILINE)
    return {name: word for names, word in rows for name in re.findall(r"`(\w+)`", names)}


CHAT, COMPLETION = ChatRequest.model_fields.keys(), CompletionRequest.model_fields.keys()


def test_every_field_is_in_its_table() -> None:
    assert table("Both").keys() == CHAT & COMPLETION
    assert table("Chat completions only").keys() == CHAT - COMPLETION
    assert table("Completions only").keys() == COMPLETION - CHAT
    rest = table("Ignored and refused everywhere")
    assert {name for name, word in rest.items() if word == "ignored"} == IGNORED.keys() - CHAT
    assert {name for name, word in rest.items() if word == "refused"} == {*REFUSED, "skip_special_tokens"}


def test_what_a_table_calls_supported_is_not_refused() -> None:
    for section in ("Both", "Chat completions only", "Completions only"):
        words = table(section)
        assert {name for name, word in words.items() if word == "refused"} <= {"suffix"}
        assert not {name for name, word in words.items() if word == "supported"} & {*REFUSED}
