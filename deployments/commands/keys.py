"""``dibit keys``: make, list, revoke and rotate API keys. Heavy libraries are imported only when a command runs."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deployments.access.keys import ApiKey

app = typer.Typer(
    name="keys",
    help="Make, list, revoke and rotate API keys.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NEW_EXAMPLES = """[bold]Examples[/bold]

dibit keys new --file /etc/dibit/keys.jsonl --name search --expires 90d

dibit keys new --file /etc/dibit/keys.jsonl --name batch --model "ernie-*" --tokens-per-minute 200000 --max-concurrent 8

dibit keys new --file /etc/dibit/keys.jsonl --name prometheus --no-models

KEY=$(dibit keys new --file - --name demo 2> keys.jsonl)

The key is shown once, on standard output; the file holds its hash. Servers read the file again by themselves."""

KeyFileOption = Annotated[
    Path,
    typer.Option("--file", envvar="DIBIT_KEYS_FILE", help="Key file, as in access.keys_file.", show_default=False),
]
KeyId = Annotated[str, typer.Argument(help="Id of the key, as 'dibit keys list' shows it.", show_default=False)]

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


@app.command("new", epilog=NEW_EXAMPLES)
def new(
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            envvar="DIBIT_KEYS_FILE",
            help="Key file to add to; it is made if need be. '-' writes the line to standard error instead.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="What logs call it.", show_default=False)],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model it is for, or a pattern with *; may be repeated. All by default.", show_default=False),
    ] = None,
    no_models: Annotated[
        bool, typer.Option("--no-models", help="For metrics and pages only, such as a monitor needs.")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="At most.", show_default=False)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and answers together, at most.", show_default=False)
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at once.", show_default=False)] = None,
    expires: Annotated[
        str | None, typer.Option(help="After a time (90d, 12h, 30m) or at one (2030-01-31).", show_default=False)
    ] = None,
) -> None:
    """Make a key and print it, this once."""
    from deployments.access.store import KeyFile, KeyOptions, new_record
    from engine.errors import ConfigError

    if model and no_models:
        raise ConfigError("--model and --no-models contradict each other; give one of them")
    now = _now()
    options = KeyOptions(
        name=name,
        models=() if no_models else tuple(model or ["*"]),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        expires=None if expires is None else _moment(expires, now),
    )
    if str(file) == "-":
        key, record = new_record(options, now=now)
        typer.echo(record.line(), nl=False, err=True)
        typer.echo(key)
        return
    key, record = KeyFile(file).add(options, now=now)
    _show(key, record)


@app.command("list")
def list_keys(
    file: KeyFileOption,
    as_json: Annotated[bool, typer.Option("--json", help="The lines of the file, one JSON object a key.")] = False,
) -> None:
    """Show all keys: ids, names, rights, limits, and which are good no longer."""
    from deployments.access.store import KeyFile

    keys = KeyFile(file).list()
    if as_json:
        sys.stdout.write("".join(key.line() for key in keys))
        return
    rows = [("ID", "NAME", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "AT ONCE", "MADE", "STATE")]
    now = _now()
    for key in keys:
        state = key.refusal(now) or ("good" if key.expires is None else f"good until {key.expires:%Y-%m-%d %H:%M}")
        limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
        requests, tokens, concurrent = ("-" if limit is None else str(limit) for limit in limits)
        models = ",".join(key.models) or "none"
        rows.append((key.id, key.name, models, requests, tokens, concurrent, f"{key.created:%Y-%m-%d}", state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command("revoke")
def revoke(key_id: KeyId, file: KeyFileOption) -> None:
    """End a key; servers refuse it as soon as they have read the file again."""
    from deployments.access.store import KeyFile

    record = KeyFile(file).revoke(key_id, now=_now())
    typer.echo(f"Revoked {record.id} ({record.name}).", err=True)


@app.command("rotate")
def rotate(
    key_id: KeyId,
    file: KeyFileOption,
    overlap: Annotated[str, typer.Option(help="How long the old key stays good: 30m, 24h, 7d.")] = "24h",
) -> None:
    """Make a key with the rights and limits of an old one, which ends when the overlap is over."""
    from deployments.access.store import KeyFile

    now = _now()
    until = _moment(overlap, now)
    key, record = KeyFile(file).rotate(key_id, now=now, old_until=until)
    _show(key, record)
    typer.echo(f"The old one, {key_id}, ends {until:%Y-%m-%d %H:%M} UTC at the latest.", err=True)


def _show(key: str, record: ApiKey) -> None:
    typer.echo(f"Made {record.id} ({record.name}). This is the only time that the key is shown:", err=True)
    typer.echo(key)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _moment(text: str, now: datetime) -> datetime:
    """A time from now such as ``90d``, or a date."""
    from engine.errors import ConfigError

    try:
        if found := re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip()):
            return now + timedelta(**{_UNITS[found[2]]: int(found[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is no time; expected one such as 90d, 12h, 30m or 2030-01-31") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    if moment <= now:
        raise ConfigError(f"{text} is in the past")
    return moment
