"""Queries for Prometheus, read by a parser of its language."""

from __future__ import annotations

from collections.abc import Iterator

import promql_parser


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every series that a query asks for: its name, and what is asked of its labels.

    Raises:
        ValueError: the query is none.
    """
    found: list[promql_parser.VectorSelector] = []

    def note(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), note)
    for selector in found:
        yield selector.name, {matcher.name: matcher.value for matcher in selector.matchers.matchers}
