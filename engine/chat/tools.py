"""Tools for models whose chat template knows none: spelled out in messages of the roles that every template has.

The wording is that of Hermes and Qwen2.5, which many instruction-tuned models have seen: the tools as JSON in the
system message, calls in ``<tool_call>`` in the assistant's, results in ``<tool_response>`` in the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def without_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with calls and their results as text of the assistant and the user.

    Args:
        messages: as :func:`engine.chat.template.normalize` makes them.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if result and result[-1].pop("_results", False):  # of calls at once: one message, as templates do it
                result[-1] = {"role": "user", "content": f"{result[-1]['content']}\n{text}", "_results": True}
            else:
                result.append({"role": "user", "content": text, "_results": True})
            continue
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        if calls:
            plain["content"] = "\n".join([text for text in (message.get("content"),) if text] + calls)
        result.append(plain)
    for message in result:
        message.pop("_results", None)
    return result


def with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation with the tools, in OpenAI's form, told in its system message."""
    text = _BEFORE + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _AFTER
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first.get('content') or ''}\n\n{text}".lstrip()}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    written = {"name": function.get("name"), "arguments": function.get("arguments") or {}}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>"
