"""Cheap variations of a request: many more of them than hypothesis can make in the same time."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

from tests.fuzz.requests import PATHS, Request

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
_EXTREMES = (
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1",
    b"-0.0",
    b"1.5",
    b"1e-400",
    b"1e400",
    b"NaN",
    b"-Infinity",
    b"9" * 400,
    b"2147483648",
    b"9223372036854775808",
    b"18446744073709551616",
    b'""',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\ud83d\\ude00"',
    b'"' + b"x" * 2000 + b'"',
    b"[]",
    b"[[]]",
    b"[null]",
    b"{}",
    b'{"":{}}',
    b"[" * 300 + b"]" * 300,
)


def mutants(request: Request, *, seed: int, count: int) -> Iterator[Request]:
    """``count`` variations: of values in the body, of its bytes, of where it is sent."""
    dice = random.Random(seed)
    for _ in range(count):
        body, path = request.body, request.path
        for _ in range(dice.randint(1, 2)):
            match dice.randrange(8):
                case 0:
                    body = _bytes(body, dice)
                case 1:
                    path = dice.choice(PATHS)
                case _:
                    body = _token(body, dice)
        yield replace(request, body=body, path=path)


def _token(body: bytes, dice: random.Random) -> bytes:
    """Another value, or name of a field, in place of one."""
    found = list(_TOKENS.finditer(body[:20_000]))
    if not found:
        return _bytes(body, dice)
    place = dice.choice(found)
    other = dice.choice(_EXTREMES) if dice.random() < 0.7 else dice.choice(found)[0]
    return body[: place.start()] + other + body[place.end() :]


def _bytes(body: bytes, dice: random.Random) -> bytes:
    start = dice.randint(0, len(body))
    end = min(start + dice.choice((0, 1, 4, 50)), len(body))
    middle = dice.choice((b"", dice.randbytes(dice.randint(1, 4)), body[start:end] * 2, b'"', b"}", b"\\", b","))
    return body[:start] + middle + body[end:]
