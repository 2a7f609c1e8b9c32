"""API keys: what is kept of them, who finds them, and what a broken file does to them."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments import cli
from deployments.access.config import AccessConfig
from deployments.access.keyring import Keyring
from deployments.access.keys import KeyFileError, KeySet, make_key, parse_keys
from deployments.access.store import KeyFile, KeyOptions
from engine.errors import ConfigError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.jsonl")


def ring(path: Path) -> Keyring:
    return Keyring(AccessConfig(keys_file=str(path)), on_change=lambda _: None)


def test_only_the_key_itself_is_found(file: KeyFile) -> None:
    key, record = file.add(KeyOptions(name="a"), now=NOW)
    other, _ = file.add(KeyOptions(name="b"), now=NOW)
    keys = KeySet(file.list())
    assert keys.find(key.encode()) == record
    swapped = key[:18] + other[18:]  # the id of one with the secret of the other
    for wrong in (swapped, key[:-1], key + "A", key.upper(), " " + key, "", "sk-dibit-", record.hash, make_key()[0]):
        assert keys.find(wrong.encode()) is None


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_no_other_bytes_are_found(presented: bytes) -> None:
    key, key_id, digest = make_key()
    line = json.dumps({"id": key_id, "name": "a", "hash": digest, "created": NOW.isoformat()})
    keys = KeySet(parse_keys(line, source="test"))
    assert keys.find(key.encode()) is not None
    for wrong in (presented, key.encode()[:-1] + presented[:1], key.encode()[:18] + presented):
        assert (keys.find(wrong) is not None) == (wrong == key.encode())


def test_the_file_holds_no_key_and_is_for_its_owner_alone(file: KeyFile) -> None:
    key, record = file.add(KeyOptions(name="a"), now=NOW)
    text = file.path.read_text()
    assert key not in text
    assert key[18:] not in text
    assert record.hash in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_comments_modes_and_links_survive_a_change(file: KeyFile, tmp_path: Path) -> None:
    _, record = file.add(KeyOptions(name="a"), now=NOW)
    file.path.write_text("# ours\n\n" + file.path.read_text().rstrip("\n"))
    file.path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(file.path)
    KeyFile(link).revoke(record.id, now=NOW)
    KeyFile(link).add(KeyOptions(name="b"), now=NOW)
    assert link.is_symlink()
    assert file.path.read_text().startswith("# ours\n\n{")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640
    assert [(key.name, key.revoked is not None) for key in file.list()] == [("a", True), ("b", False)]


def test_writers_at_once_lose_nothing(file: KeyFile) -> None:
    threads = [
        threading.Thread(target=lambda n=n: file.add(KeyOptions(name=f"key {n}"), now=NOW))  # type: ignore[misc]
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in file.list()} == {f"key {n}" for n in range(16)}


def test_rotation_keeps_rights_and_ends_the_old_key(file: KeyFile) -> None:
    options = KeyOptions(
        name="a", models=("m*",), requests_per_minute=7, max_concurrent=2, expires=NOW + timedelta(days=90)
    )
    old_key, old = file.add(options, now=NOW)
    later = NOW + timedelta(days=80)
    new_key, new = file.rotate(old.id, now=later, old_until=later + timedelta(hours=24))
    keys = KeySet(file.list())
    assert keys.find(new_key.encode()) == new
    assert (new.name, new.models, new.requests_per_minute, new.max_concurrent) == ("a", ("m*",), 7, 2)
    assert new.expires == later + timedelta(days=90)
    ending = keys.find(old_key.encode())
    assert ending is not None
    assert ending.refusal(later) is None
    assert "expired" in str(ending.refusal(later + timedelta(hours=24)))
    file.revoke(new.id, now=later)
    with pytest.raises(KeyFileError, match="revoked"):
        file.rotate(new.id, now=later, old_until=later)


LINE = '{"id":"0123abcd","name":"a","hash":"sha256:' + "0" * 64 + '","created":"2030-01-01T00:00:00Z"}'
SECRET = "sk-dibit-canary"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense " + SECRET, "JSON"),
        (SECRET, "JSON"),
        (LINE[:-1], "JSON"),
        ("[]", "object"),
        (LINE.replace("0123abcd", SECRET), "id:"),
        (LINE.replace("sha256:", SECRET), "hash:"),
        (LINE.replace('"name"', f'"{SECRET}"'), "name:"),
        (LINE[:-1] + f',"{SECRET}":1}}', "xtra"),
        (LINE[:-1] + ',"requests_per_minute":0}', "requests_per_minute"),
        (LINE[:-1] + ',"expires":"2030-01-01"}', "expires"),
        (LINE.replace('"a"', '"a\\nb"'), "name"),
        (LINE, "same id"),
    ],
)
def test_a_broken_line_is_named_and_not_quoted(line: str, says: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse_keys(f"# keys\n{LINE}\n\n{line}\n", source="key file k")
    assert "key file k, line 4: " in str(caught.value)
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_changed_file_counts_and_a_broken_one_does_not(file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    first, record = file.add(KeyOptions(name="a"), now=NOW)
    keyring = ring(file.path)
    second, _ = file.add(KeyOptions(name="b"), now=NOW)
    good = file.path.read_text()

    async def scenario() -> None:
        assert keyring.find(second.encode()) is None
        await keyring.reload()
        assert keyring.find(second.encode()) is not None
        for broken in (lambda: file.path.write_text(good + SECRET + "\n"), file.path.unlink):
            broken()
            caplog.clear()
            with caplog.at_level(logging.ERROR):
                await keyring.reload()
                await keyring.reload()
            assert len(caplog.records) == 1, "told once, not with every look"
            assert "2 keys" in caplog.text
            assert SECRET not in caplog.text
            assert keyring.find(first.encode()) is not None
        file.path.write_text(good.splitlines()[0] + "\n")
        await keyring.reload()
        assert keyring.find(first.encode()) == record
        assert keyring.find(second.encode()) is None

    asyncio.run(scenario())


def test_a_server_does_not_start_without_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        ring(tmp_path / "nothing.jsonl")
    monkeypatch.delenv("DIBIT_TEST_KEYS", raising=False)
    config = AccessConfig(keys_env="DIBIT_TEST_KEYS")
    with pytest.raises(ConfigError, match="DIBIT_TEST_KEYS"):
        Keyring(config, on_change=lambda _: None)
    monkeypatch.setenv("DIBIT_TEST_KEYS", LINE + "\nbroken")
    with pytest.raises(ConfigError, match="DIBIT_TEST_KEYS, line 2"):
        Keyring(config, on_change=lambda _: None)
    monkeypatch.setenv("DIBIT_TEST_KEYS", LINE)
    assert [key.id for key in Keyring(config, on_change=lambda _: None).keys] == ["0123abcd"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keys_file": "keys.jsonl"}, "absolute"),
        ({"keys_file": "/k", "keys_env": "K"}, "one place"),
        ({"keys_env": "sk-dibit-canary"}, "environment variable"),
        ({"keys": ["sk-dibit-canary"]}, "xtra"),
        ({"public_paths": ["health"]}, "'/'"),
        ({"cors_origins": ["example.com"]}, "origin"),
        ({"cors_origins": ["https://example.com/"]}, "origin"),
        ({"log": "access.log"}, "absolute"),
        ({"max_requests_in_flight": 0}, "greater"),
    ],
)
def test_a_wrong_option_is_refused_without_being_quoted(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        AccessConfig(**options)
    assert "canary" not in str(caught.value)


def test_the_command_makes_lists_rotates_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.jsonl")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["keys", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, err = run("new", "--file", path, "--name", "search", "--model", "m*", "--max-concurrent", "3")
    assert code == 0
    key = out.strip()
    assert key not in err
    record = KeySet(KeyFile(Path(path)).list()).find(key.encode())
    assert record is not None
    assert (record.name, record.models, record.max_concurrent) == ("search", ("m*",), 3)
    code, out, _ = run("list", "--file", path)
    assert code == 0
    assert "search" in out
    assert key not in out
    code, out, _ = run("rotate", record.id, "--file", path, "--overlap", "1h")
    assert KeySet(KeyFile(Path(path)).list()).find(out.strip().encode()) is not None
    assert run("revoke", record.id, "--file", path)[0] == 0
    assert "revoked" in run("list", "--file", path)[1]
    assert len(run("list", "--file", path, "--json")[1].splitlines()) == 2
    for wrong in (
        ["revoke", "ffffffff", "--file", path],
        ["list", "--file", path + "x"],
        ["new", "--file", path, "--name", "a\nb"],
        ["new", "--file", path, "--name", "a", "--expires", "soon"],
        ["new", "--file", path, "--name", "a", "--expires", "2020-01-01"],
        ["new", "--file", path, "--name", "a", "--model", "m", "--no-models"],
        ["new", "--file", f"{path}/below/keys", "--name", "a"],
    ):
        code, out, err = run(*wrong)
        assert (code, out) == (1, "")
        assert err.startswith("Error: ")
    code, out, err = run("new", "--file", "-", "--name", "monitor", "--no-models")
    record = KeySet(parse_keys(err, source="stderr")).find(out.strip().encode())
    assert record is not None
    assert record.models == ()
