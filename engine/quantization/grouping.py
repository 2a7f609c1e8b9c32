"""Which group sizes a matrix of K input features allows, for the formats whose groups have a size to choose."""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError, UnsupportedError

WORD_ROWS = 32
"""Rows of a column that one int32 word of a plane holds: every group is made of whole words."""
LARGEST_GROUP = 256
PADDLE_ROWS = 64
"""Paddle's tiles (wint8, wint4) and WINT2's groups."""


def check_group_size(name: str, group_size: Any) -> None:
    """Refuse a group size that no matrix could have.

    Raises:
        ConfigError: not an integer.
        UnsupportedError: not one of 32, 64, ... 256.
    """
    check_integer(name, "group_size", group_size)
    if not WORD_ROWS <= group_size <= LARGEST_GROUP or group_size % WORD_ROWS:
        raise UnsupportedError(
            f"{name}: group_size {group_size} is not supported; "
            f"supported: multiples of {WORD_ROWS} from {WORD_ROWS} to {LARGEST_GROUP}"
        )


def check_integer(name: str, option: str, value: Any) -> None:
    """Raises ConfigError where ``value`` is not an integer (JSON's true and 2.0 are not)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: {option} is {value!r}; expected an integer")


def check_rows(name: str, k: int, n: int, *, group_size: int) -> None:
    """Refuse a matrix [K, N] whose rows do not divide into groups; the message says what would hold it.

    Raises:
        UnsupportedError: K is not a multiple of ``group_size``.
    """
    if k % group_size:
        raise UnsupportedError(
            f"{name} with group_size {group_size} needs K in multiples of {group_size}; "
            f"found K={k}, N={n}. {formats_that_fit(k)}"
        )


def formats_that_fit(k: int) -> str:
    """A sentence for error messages: the formats that can hold K rows, with the group sizes that divide them."""
    fitting = ["bf16"]
    if k % PADDLE_ROWS == 0:
        fitting += ["wint8", "wint4", "wint2"]
    sizes = [size for size in range(WORD_ROWS, LARGEST_GROUP + 1, WORD_ROWS) if k % size == 0]
    if sizes:
        fitting.append(f"bitplane and gptq with group_size {', '.join(map(str, sizes))}")
    return f"K={k} fits: {'; '.join(fitting)}"
