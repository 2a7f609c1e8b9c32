"""Small real tokenizers, trained here: SentencePiece BPE with byte fallback as ERNIE's, and two tokenizer.json."""

import io
import json

import pytest
import sentencepiece
import tokenizers

from engine.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "User: What is the answer to this question?\nAssistant: The answer is 42.\n",
    "def add(left, right):\n    return left + right\n",
    "größe straße naïve café déjà vu 你好世界 こんにちは",
    "A server for mixture-of-experts models speaks many tokens a second.",
] * 20
SPECIALS = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]


def train(**options):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.98,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def write(folder, *, model=None, source=None, first_special=420, files=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | {first_special + i: name for i, name in enumerate(SPECIALS)}
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
        config = {
            "added_tokens_decoder": {str(i): {"content": name, "special": True} for i, name in names.items()},
            "additional_special_tokens": SPECIALS,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if source is not None:
        (folder / "tokenizer.json").write_text(source)
    for name, value in (files or {}).items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def metaspace_source():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    source = json.loads(tokenizer.to_str())
    # Bytes are pieces of the vocabulary, not added tokens.
    source["added_tokens"] = [token for token in source["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(source))
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer.to_str()


def byte_level_source():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer.to_str()


KINDS = {
    "plain": lambda folder: write(folder, model=train(add_dummy_prefix=False)),
    "dummy_prefix": lambda folder: write(folder, model=train(add_dummy_prefix=True)),
    # Special tokens as pieces that text matches, as some uploads have them.
    "user_defined": lambda folder: write(
        folder, model=train(add_dummy_prefix=False, user_defined_symbols=SPECIALS), first_special=3
    ),
    "metaspace_json": lambda folder: write(folder, source=metaspace_source()),
    "byte_level_json": lambda folder: write(folder, source=byte_level_source()),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizer_of(folders):
    made = {kind: Tokenizer.from_folder(folder) for kind, folder in folders.items()}
    return made.__getitem__


@pytest.fixture(params=list(KINDS), scope="session")
def any_tokenizer(request, tokenizer_of):
    return tokenizer_of(request.param)


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer_of):
    return tokenizer_of("plain")
