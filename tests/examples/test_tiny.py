"""ernie-tiny: the split, the tokenizer, the training model, and the folder that is committed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).parents[2] / "examples" / "ernie-tiny"
FOLDER = EXAMPLE / "bf16"
sys.path.insert(0, str(EXAMPLE))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import export  # noqa: E402
import optimizer  # noqa: E402
import tokenizer  # noqa: E402
import train  # noqa: E402
from loss import HeadLoss  # noqa: E402
from model import Ernie, Shape, placement  # noqa: E402
from stream import BLOCK, Stream  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SMALL = Shape(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=8,
    intermediate_size=64,
    moe_intermediate_size=32,
    moe_num_experts=4,
    moe_k=2,
)
# U+2581 is how SentencePiece itself writes a space, so no SentencePiece model gives it back.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def text() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def trained() -> Ernie:
    return export.load(FOLDER)


def test_the_split_is_a_function_of_the_path_alone(tmp_path: Path) -> None:
    paths = [f"package/{i}.py" for i in range(200)]
    for path in paths:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'"""About {path}."""\n')
    held_out = [source.path for source in corpus.sources(held_out=True, root=tmp_path)]
    in_training = [source.path for source in corpus.sources(held_out=False, root=tmp_path)]
    assert sorted(held_out + in_training) == sorted(paths)
    assert held_out == [path for path in sorted(paths) if corpus.is_held_out(path)]
    assert 0 < len(held_out) < 30


def test_the_split_is_the_one_the_model_was_trained_with() -> None:
    assert [name for name in ("ast.py", "os.py", "json/decoder.py") if corpus.is_held_out(name)] == []
    assert all(corpus.is_held_out(name) for name in ("functools.py", "signal.py", "email/parser.py"))


def test_folders_of_tests_are_left_out(tmp_path: Path) -> None:
    for name in ("test/a.py", "pkg/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert corpus.sources(held_out=False, root=tmp_path) + corpus.sources(held_out=True, root=tmp_path) == []


def test_docstrings_become_entries() -> None:
    method = "    def f(self, x=1):\n        'Do f.\\n\\n>>> f()'\n"
    source = corpus.Source("pkg/__init__.py", f"'Top.'\nclass A:\n    'An A.'\n{method}")
    assert corpus.documented(source) == [
        corpus.Entry("pkg", "", "Top."),
        corpus.Entry("pkg.A", "", "An A."),
        corpus.Entry("pkg.A.f", "f(self, x=1)", "Do f."),
    ]


def test_the_chat_string_is_ernies() -> None:
    assert corpus.chat([("Q1", "A1"), ("Q2", "A2")], "SYS") == (
        "<|begin_of_sentence|>SYS\nUser: Q1\nAssistant: A1<|end_of_sentence|>User: Q2\nAssistant: A2<|end_of_sentence|>"
    )


def test_the_chat_template_writes_the_chat_string() -> None:
    from jinja2 import Template

    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    template = Template(config["chat_template"], keep_trailing_newline=True)
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == corpus.chat([("Q1", "A1")]) + "User: Q2\nAssistant: "


@given(TEXT)
@example("def f(x):\n\treturn  x\r\n\n\n        # \x00 \u00e9 \u65e5\u672c \U0001f389   ")
@example("<|end_of_sentence|></s><s><0x41>")
def test_any_text_comes_back(whole: str) -> None:
    text = Tokenizer.load(FOLDER)
    assert text.decode(text.encode(whole)) == whole


def test_ids_are_in_ernies_order(text: Tokenizer) -> None:
    assert [text.encode(str(digit)) for digit in range(10)] == [[tokenizer.FIRST_DIGIT + digit] for digit in range(10)]
    assert text.encode("\U0001f389") == [tokenizer.FIRST_BYTE + byte for byte in "\U0001f389".encode()]
    assert text.encode("12") == [4, 5]
    assert text.encode("<|end_of_sentence|>", specials=True) == [tokenizer.CHAT_END] == [8000]
    assert tokenizer.CHAT_END not in text.encode("<|end_of_sentence|>")
    assert tokenizer.USED <= tokenizer.TABLE == Shape().vocab_size
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()} == {
        0: "<unk>", 1: "<s>", 2: "</s>", 8000: "<|end_of_sentence|>", 8001: "<|begin_of_sentence|>",
    }  # fmt: skip


def test_a_newline_and_its_indentation_are_one_token(text: Tokenizer) -> None:
    assert len(text.encode("\n        return")) == 2


def test_logits_are_those_of_transformers(trained: Ernie) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert type(peer).__name__ == "Ernie4_5_MoeForCausalLM"
    ids = torch.randint(3, 8000, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trained(ids), peer(ids).logits, atol=1e-3, rtol=0)


def test_the_folder_is_small_enough_for_git_and_has_exact_routers() -> None:
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 17_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    exact = {name for name, kind in kinds.items() if kind == "F32"}
    assert set(kinds.values()) == {"BF16", "F32"}
    assert exact == {name for name in kinds if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))}


def test_export_and_load_are_inverse(tmp_path: Path, text: Tokenizer) -> None:
    model = Ernie(SMALL)
    export.save(model, tmp_path / "folder", pieces=text.model)
    export.save(model, tmp_path / "folder", pieces=text.model)  # over the first
    for name, value in export.load(tmp_path / "folder").state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-2, rtol=1e-2)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_placement_groups_by_expert() -> None:
    chosen = torch.tensor([2, 0, 2, 3, 0, 2])
    source, slots, ends, loads = placement(chosen, 4)
    assert loads.tolist() == [2, 0, 3, 1]
    begins = [0, *ends.tolist()[:-1]]
    for row, expert in enumerate(chosen.tolist()):
        assert begins[expert] <= slots[row] < ends[expert]
        assert source[slots[row]] == row


def test_the_chunked_loss_is_cross_entropy() -> None:
    hidden, head = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (300,))
    expected = F.cross_entropy(hidden @ head.T, targets)
    wanted = torch.autograd.grad(expected, (hidden, head))
    loss = HeadLoss.apply(hidden, head, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), wanted)


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = Ernie(SMALL)
    optimizers = optimizer.make(model)
    ids = torch.randint(0, 64, (4, 33))
    losses = []
    for _ in range(12):
        hidden = model.model(ids[:, :-1], torch.float32).flatten(0, 1)
        loss = HeadLoss.apply(hidden, model.lm_head.weight, ids[:, 1:].flatten())
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_balance_moves_the_bias_against_the_load() -> None:
    model = Ernie(SMALL)
    mixture = model.mixtures()[0]
    for each in model.mixtures():
        each.loads.copy_(torch.tensor([10.0, 1.0, 2.0, 3.0]))
    shares = model.balance(0.5)
    assert shares[0].tolist() == [0.625, 0.0625, 0.125, 0.1875]
    assert mixture.moe_statics.e_score_correction_bias.tolist() == [[-0.5, 0.5, 0.5, 0.5]]
    assert mixture.loads.sum() == 0


def test_muon_updates_are_orthogonal() -> None:
    values = torch.linalg.svdvals(optimizer.orthogonalise(torch.randn(3, 16, 32)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_stream_is_a_function_of_its_position() -> None:
    documents = [[i] * 1000 for i in range(20)]
    first, second = (Stream(lambda number: list(documents), seed=1) for _ in range(2))
    for _ in range(12):
        first.take()
    second.position = first.position
    assert first.position[0] > 0
    block = first.take()
    assert torch.equal(block, second.take())
    assert len(block) == BLOCK + 1


def test_sliding_evaluation_counts_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "WINDOW", 16)
    monkeypatch.setattr(evaluate, "STRIDE", 4)
    model = Ernie(SMALL)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every id then costs log2(64) = 6 bits
    for length in (2, 16, 17, 18, 40):
        assert evaluate.document_bits(model, [1] * length) == pytest.approx(6 * (length - 1), rel=1e-4)


def test_what_people_ask_about_first() -> None:
    assert all(map(corpus.is_well_known, ("len", "json", "os.path.join")))
    assert not any(map(corpus.is_well_known, ("os._exit", "idlelib.help.show", "json.decoder.JSONDecoder")))


def test_training_sees_an_answer_begin_where_a_prompt_ends(text: Tokenizer) -> None:
    prompt = corpus.chat([("Q1", "A1")]) + "User: Q2\nAssistant: "
    ids = train.chat_ids(text, prompt + "Return it.<|end_of_sentence|>")
    before = text.encode(prompt, specials=True)
    assert ids[: len(before)] == before
    assert ids[len(before) :] == [*text.encode("Return it."), tokenizer.CHAT_END]
