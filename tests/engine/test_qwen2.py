"""A Qwen2 folder, as transformers saves it, through the whole engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import qwen2_tokenizer
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from engine import LLM, SamplingParams
from engine.errors import CheckpointError

OPTIONS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "num_kv_blocks": 64, "max_model_len": 128}
PROMPTS = ["The quick brown", "größe 你好", "def add(left, right):\n    return", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    path = qwen2_tokenizer.write(tmp_path_factory.mktemp("qwen2"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=416,  # more rows than tokens, as in Qwen2's own
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # zero in a new model
                parameter.uniform_(-1, 1)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, config.eos_token_id])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """The engine never makes an id that has no token; neither may transformers here."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    without_token = [[id_] for id_ in range(len(tokenizer), model.config.vocab_size)]

    def generate(ids: list[int], **options) -> list[int]:
        with torch.inference_mode():
            every = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=24, bad_words_ids=without_token, pad_token_id=0,
                **options,
            )  # fmt: skip
        return every[0, len(ids) :].tolist()

    return tokenizer, generate


@pytest.fixture(scope="module")
def llm(folder):
    threads = torch.get_num_threads()
    with LLM(folder, max_num_seqs=4, max_num_batched_tokens=16, **OPTIONS) as model:
        yield model
    torch.set_num_threads(threads)


def test_greedy_text_is_that_of_transformers(llm, reference):
    tokenizer, generate = reference
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        assert output.prompt_token_ids == tokenizer.encode(prompt)
        expected = generate(output.prompt_token_ids, eos_token_id=None)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_chat_is_that_of_transformers(llm, reference):
    tokenizer, generate = reference
    messages = [{"role": "user", "content": "What is größe?"}]
    (output,) = llm.chat(messages, GREEDY)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == generate(ids, eos_token_id=None)


def test_every_end_token_of_the_files_ends_the_text(folder, llm, reference, tmp_path):
    tokenizer, generate = reference
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert {*llm.tokenizer.eos_token_ids, *llm.model_config.eos_token_ids} == ends
    # Whichever ids generation_config.json lists, here one that the model does say.
    (free,) = llm.generate(PROMPTS[:1], GREEDY)
    end = free.outputs[0].token_ids[5]
    copy(folder, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, end]}))
    with LLM(tmp_path, **OPTIONS) as other:
        (output,) = other.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=24))
    expected = generate(free.prompt_token_ids, eos_token_id=[*ends, end])
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids == expected
    assert len(expected) < 24


def test_missing_biases_are_named(folder, tmp_path):
    copy(folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name or not name.endswith(".bias")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no biases for the queries, keys and values of layer 1"):
        LLM(tmp_path, **OPTIONS)


def copy(folder: Path, to: Path) -> None:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
