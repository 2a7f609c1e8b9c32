"""Small JSON schemas, all of whose values are small."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

names = st.text(alphabet='abcé "\\n', min_size=1, max_size=5)

leaves: st.SearchStrategy[Schema] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-200, 200),
        st.integers(0, 900),
    ),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.one_of(names, st.integers(), st.none()), min_size=1, max_size=3)
    ),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
)


def _array(items: Schema, low: int, more: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}


def _object(properties: dict[str, Schema], needed: list[bool]) -> Schema:
    required = [name for name, need in zip(properties, needed, strict=False) if need]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


schemas: st.SearchStrategy[Schema] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3)),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)
