"""The text every Python machine has: standard library sources, and chats made of their docstrings.

A source file is one document. A chat is a question about a module, class or function and the first
paragraphs of its docstring as the answer, in ERNIE-4.5's chat string. Which files are held out of
training is decided by a hash of the file's path, so every machine agrees on it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smalltalk import PAIRS, SYSTEM_LINES

LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
HELD_OUT_EVERY = 20
DOCUMENT_BEGIN, DOCUMENT_END = "<s>", "</s>"
CHAT_BEGIN, CHAT_END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
PUBLIC_NAMES = {"posixpath": "os.path", "_collections_abc": "collections.abc", "_pyio": "io", "_pydatetime": "datetime"}
LONGEST_ANSWER = 420  # characters; a small model learns to end an answer only if answers do end
C_MODULES = [
    "_bisect", "_collections", "_csv", "_datetime", "_functools", "_heapq", "_io", "_operator", "_random", "_socket",
    "_struct", "_thread", "_warnings", "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler",
    "fcntl", "gc", "itertools", "marshal", "math", "mmap", "posix", "pwd", "resource", "select", "sys", "syslog",
    "time", "unicodedata", "zlib",
]  # fmt: skip
# What people ask about first comes more often: built-in names and modules, and what these modules offer.
WELL_KNOWN = {
    "", "argparse", "asyncio", "collections", "copy", "csv", "datetime", "glob", "hashlib", "heapq", "io", "itertools",
    "json", "logging", "math", "os", "os.path", "pathlib", "pickle", "random", "re", "shutil", "socket", "string",
    "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "unittest", "zlib",
}  # fmt: skip
WELL_KNOWN_TIMES = 6
TEMPLATES = (
    "What does {} do?",
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "Explain {} to me.",
    "How do I use {}?",
    "What is {} for?",
    "Tell me about {}.",
    "Describe {}.",
    "What can you tell me about {}?",
)
CALL_TEMPLATES = ("How do I call {}?", "What are the arguments of {}?", "Which parameters does {} take?")


@dataclass(frozen=True)
class Source:
    """One file of the standard library, `path` relative to its root and with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class Entry:
    """One documented name: how it is called (empty where it is not), and what its docstring says."""

    name: str
    signature: str
    doc: str


def is_held_out(path: str) -> bool:
    """Whether the file at this relative posix path is kept out of training, here and on every machine."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def sources(*, held_out: bool, root: Path | None = None) -> list[Source]:
    """The library's source files on one side of the split, in the order of their paths."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if LEFT_OUT_FOLDERS & set(relative.parts) or is_held_out(relative.as_posix()) != held_out:
            continue
        text = file.read_bytes().decode("utf-8", errors="ignore").replace("\u2581", "")  # SentencePiece's own space
        if text:
            found.append(Source(relative.as_posix(), text))
    return found


def clean(docstring: str) -> str:
    """The first paragraphs of a docstring, up to LONGEST_ANSWER characters, without doctests and field lists."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if ">>>" in paragraph or paragraph.lstrip().startswith((":", "..", "@", "---", "===")):
            break
        if sum(map(len, kept)) + len(paragraph) > LONGEST_ANSWER:
            break
        indented = any(line.startswith((" ", "-", "*")) for line in paragraph.splitlines()[1:])
        kept.append(paragraph.strip() if indented else " ".join(paragraph.split()))
    return "\n\n".join(kept)


def _walk(node: ast.AST, prefix: str) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{child.name}"
        signature = ""
        if not isinstance(child, ast.ClassDef):
            signature = f"{child.name}({ast.unparse(child.args)})"
        yield Entry(name, signature, clean(ast.get_docstring(child) or ""))
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name)


def documented(source: Source) -> list[Entry]:
    """The module, classes, functions and methods of a source file that have a docstring."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:  # lib2to3 carries templates that no Python 3 parses
        return []
    module = source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = PUBLIC_NAMES.get(module, module)
    entries = [Entry(module, "", clean(ast.get_docstring(tree) or "")), *_walk(tree, module)]
    return [entry for entry in entries if entry.doc]


def documented_c_module(name: str) -> list[Entry]:
    """The documented names of a module written in C, asked of the module itself."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # a few exist on some systems only
        return []
    public = name.removeprefix("_")
    members: list[tuple[str, object]] = [(public, module)]
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isbuiltin(value)):
            continue
        qualified = attribute if name == "builtins" else f"{public}.{attribute}"
        members.append((qualified, value))
        if inspect.isclass(value) and value.__module__ in {name, public}:
            methods = sorted((k, v) for k, v in vars(value).items() if not k.startswith("_") and callable(v))
            members += [(f"{qualified}.{method}", v) for method, v in methods]
    return [Entry(n, "", clean(v.__doc__)) for n, v in members if isinstance(v.__doc__, str) and clean(v.__doc__)]


def is_well_known(name: str) -> bool:
    """Whether people ask about this qualified name first."""
    module, _, own = name.rpartition(".")
    return module in WELL_KNOWN and not own.startswith("_")


def chat(turns: list[tuple[str, str]], system: str = "") -> str:
    """ERNIE-4.5's chat string of question and answer pairs, every answer ended."""
    text = CHAT_BEGIN + (system + "\n" if system else "")
    return text + "".join(f"User: {question}\nAssistant: {answer}{CHAT_END}" for question, answer in turns)


def _turn(entry: Entry, rng: random.Random) -> tuple[str, str]:
    name = entry.name if rng.random() < 0.8 else entry.name.rpartition(".")[2]
    if entry.signature and rng.random() < 0.15:
        call = f"Call it as `{entry.signature}`. {entry.doc}"
        return rng.choice(CALL_TEMPLATES).format(name), call
    return rng.choice(TEMPLATES).format(name), entry.doc


def chats(*, held_out: bool, seed: int, root: Path | None = None) -> list[str]:
    """Chats about every documented name on one side of the split, and small talk (in training only).

    Another seed words the questions differently, which is what a second epoch wants.
    """
    rng = random.Random(seed)
    by_file = [documented(source) for source in sources(held_out=held_out, root=root)]
    by_file += [documented_c_module(name) for name in C_MODULES if is_held_out(f"{name}.c") == held_out]
    texts = []
    for entries in by_file:
        done = 0
        while done < len(entries):
            count = 2 if done + 1 < len(entries) and rng.random() < 0.15 else 1
            turns = [_turn(entry, rng) for entry in entries[done : done + count]]
            done += count
            if not held_out and rng.random() < 0.1:
                turns.insert(rng.choice([0, len(turns)]), rng.choice(PAIRS))
            texts.append(chat(turns, rng.choice(SYSTEM_LINES) if rng.random() < 0.15 else ""))
    if not held_out:
        well_known = [entry for entries in by_file for entry in entries if is_well_known(entry.name)]
        pairs = PAIRS * 12 + [_turn(entry, rng) for entry in well_known * WELL_KNOWN_TIMES]
        for pair in pairs:
            texts.append(chat([pair], rng.choice(SYSTEM_LINES) if rng.random() < 0.15 else ""))
    rng.shuffle(texts)
    return texts
