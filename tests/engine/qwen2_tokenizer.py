"""A small tokenizer of Qwen2's make: byte-level BPE trained here, in the files of a Qwen2.5 repository."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Of tokenizer.json of Qwen/Qwen2.5-7B-Instruct, as transformers has it in models/qwen2/tokenization_qwen2.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ORDINARY = ["<tool_call>", "</tool_call>"]  # added, but text
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and it doesn't stop: they've seen it, I'll say.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 23))\r\n",
    "größe straße naïve café déjà vu 你好世界 こんにちは مرحبا",
    "A server for mixture-of-experts models speaks many tokens a second.",
] * 20
CHATML = """
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}{{- message.content }}{% endif %}
    {%- for call in message.tool_calls or [] -%}
        {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor -%}
    {{- '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def train() -> tokenizers.Tokenizer:
    """290 pieces of bytes and their pairs, then the added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    options = {"add_prefix_space": False, "use_regex": False}
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(**options),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(**options)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY])
    return tokenizer


def write(folder: Path, *, chat_template: str | None = CHATML) -> Path:
    """Write tokenizer.json and tokenizer_config.json as they are on the hub."""
    tokenizer = train()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(id_): {"content": token.content, **flags, "special": token.special}
            for id_, token in tokenizer.get_added_tokens_decoder().items()
        },
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
