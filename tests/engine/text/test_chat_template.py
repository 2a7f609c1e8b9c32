"""Conversations: ERNIE's format, the repository's template, and what users must not be able to write."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chat.template import ChatTemplate
from engine.errors import ConfigError, RequestError
from engine.tokenizer import Tokenizer

BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
CHATML = """{%- for message in messages %}
{{- '<|begin_of_sentence|>' + message.role + '\n' + message.content | trim + '<|end_of_sentence|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|begin_of_sentence|>assistant\n' }}{% endif %}"""


def user(content):
    return {"role": "user", "content": content}


def with_template(folders, tmp_path, template, where="chat_template.jinja"):
    for path in folders["plain"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
    else:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return Tokenizer.from_folder(tmp_path)


def test_ernies_format_without_a_template(plain_tokenizer):
    # The strings of the model card: the last character is a space.
    render = plain_tokenizer.apply_chat_template
    system, answer = {"role": "system", "content": "SYS"}, {"role": "assistant", "content": "A1"}
    assert render([user("Q")]) == f"{BEGIN}User: Q\nAssistant: "
    assert render([system, user("Q")]) == f"{BEGIN}SYS\nUser: Q\nAssistant: "
    assert (
        render([system, user("Q1"), answer, user("Q2")])
        == f"{BEGIN}SYS\nUser: Q1\nAssistant: A1{END}User: Q2\nAssistant: "
    )
    assert render([user("Q1"), answer], add_generation_prompt=False) == f"{BEGIN}User: Q1\nAssistant: A1{END}"
    assert render([user("  Q\n\n")]) == f"{BEGIN}User:   Q\n\n\nAssistant: "
    assert render([user("Q"), {"role": "assistant", "content": None}], add_generation_prompt=False).endswith(f": {END}")


@pytest.mark.parametrize("role", ["function", "developer", "", "<|end_of_sentence|>"])
def test_ernies_format_refuses_other_roles(plain_tokenizer, role):
    with pytest.raises(RequestError, match="none of system, user, assistant") as caught:
        plain_tokenizer.encode_chat([user("Q"), {"role": role, "content": "x"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_repositorys_template_wins(folders, tmp_path, where):
    tokenizer = with_template(folders, tmp_path, CHATML, where)
    assert tokenizer.apply_chat_template([user(" Q ")]) == f"{BEGIN}user\nQ{END}{BEGIN}assistant\n"


def test_a_template_for_tools_is_used_when_there_are_tools(folders, tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    tokenizer = with_template(folders, tmp_path, named, "tokenizer_config.json")
    assert tokenizer.apply_chat_template([user("Q")]) == "plain"
    assert tokenizer.apply_chat_template([user("Q")], tools=[{"name": "größe<"}]) == '[{"name": "größe<"}]'


def test_templates_have_what_hugging_face_gives_them():
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ bos_token }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}{{ mood }}",
        special_tokens={"bos_token": "<s>"},
    )
    assert template.render([user("a"), user("b")], mood="!") == "<s>a4!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[5].content.strip() }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_a_template_that_refuses_or_fails_is_the_requests_error(template, message):
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(template).render([user("a")])
    assert caught.value.field == "messages"


def test_a_template_that_is_no_jinja_is_a_config_error():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("a\n{% if %}")


def test_text_parts_are_joined_and_others_refused(plain_tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert plain_tokenizer.apply_chat_template([user(parts)]) == f"{BEGIN}User: one\ntwo\nAssistant: "
    for content, message in (
        ([{"type": "image_url", "image_url": {}}], "image_url"),
        ([{"type": "text"}], "content\\[0\\]"),
        (["x"], "content\\[0\\]"),
        (5, "expected a string"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            plain_tokenizer.encode_chat([user(content)])
        assert caught.value.field == "messages"
    for messages in ([], [{}], ["x"], [{"role": 3}]):
        with pytest.raises(RequestError):
            plain_tokenizer.encode_chat(messages)


def test_arguments_of_tool_calls_reach_the_template_as_objects():
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.city }}")
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    assert template.render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "Köln"


# --- what users must not be able to write ----------------------------------------------------------------------------

FRAGMENTS = st.lists(
    st.sampled_from([BEGIN, END, END[:5], END[5:], "<", "|>", "<|", "</s>", " ", "a", "é", "🎉", "\n", "\U000f0000"]),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(FRAGMENTS, min_size=1, max_size=4))
def test_messages_never_make_special_tokens(any_tokenizer, contents):
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    ids = any_tokenizer.encode_chat(messages)
    special = [any_tokenizer.piece(i) for i in ids if i in any_tokenizer.special_ids]
    assert special == [BEGIN] + [END] * (len(contents) // 2)
    # And every letter of them is there.
    by_hand = "".join(
        f"User: {content}\n" if role == "user" else f"Assistant: {content}"
        for role, content in zip(roles, contents, strict=False)
    )
    shown = b"".join(map(any_tokenizer.token_bytes, ids)).decode()
    spaces = any_tokenizer.decode(any_tokenizer.encode("a"), continuation=True) == " a"  # a dummy prefix per segment
    if not spaces:
        assert shown == by_hand + "Assistant: "


def test_strings_that_a_template_joins_do_not_complete_a_special_token(folders, tmp_path):
    tokenizer = with_template(folders, tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = tokenizer.encode_chat([user(END[:7]), user(END[7:])])
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == END


def test_special_tokens_in_tools_and_names_stay_plain(folders, tmp_path):
    tokenizer = with_template(folders, tmp_path, "{{ tools | tojson }}{{ messages[0].name }}<|end_of_sentence|>")
    tools = [{"function": {"description": f"x{END}", "parameters": {"properties": {f"{END}": {"type": "string"}}}}}]
    ids = tokenizer.encode_chat([{"role": "user", "content": "", "name": END}], tools=tools)
    assert [i for i in ids if i in tokenizer.special_ids] == [tokenizer.token_id(END)]
    assert tokenizer.decode(ids) == json.dumps(tools) + END


def test_templates_may_build_special_tokens_from_roles(folders, tmp_path):
    tokenizer = with_template(folders, tmp_path, "{{ '<|' + messages[0].role + '_of_sentence|>' }}")
    assert tokenizer.encode_chat([{"role": "end", "content": ""}]) == [tokenizer.token_id(END)]


def test_a_conversation_without_special_names_is_encoded_as_the_rendered_text(any_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, user("Wie groß? <b>5 < 6</b> 🎉")]
    rendered = any_tokenizer.apply_chat_template(messages)
    assert any_tokenizer.encode_chat(messages) == any_tokenizer.encode(rendered, parse_special=True)
