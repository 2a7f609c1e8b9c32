"""Grammars made ready beside the engine: compiled once, in threads of their own, and kept.

XGrammar is imported by the first thread that compiles: it takes seconds, which nobody who asks for plain text should
wait for.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.sampling_params import StructuredOutputs
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

    from engine.structured.matcher import Matcher

CACHE_BYTES = 256 << 20
"""Memory for compiled grammars that no request needs at present; the least recently used go first."""
WORKERS = 2
"""So that one slow schema doesn't hold up the others'; each takes a core."""
MAX_WHITESPACE = 64
"""Characters between two parts of JSON: enough for indented text, and not for ever."""
MAX_MESSAGE = 300
_CONTROLS = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")  # but for line ends; tabs too, which a string can't have
_NOTHING = re.compile(rb"(?!)")


@dataclass(slots=True)
class _Job:
    """A grammar that is being compiled, and who waits for it."""

    spec: StructuredOutputs
    waiting: list[Future[xgrammar.CompiledGrammar]] = field(default_factory=list)


_Key = tuple[str, str]


class GrammarCompiler:
    """Turns :class:`StructuredOutputs` into grammars over one model's tokens.

    Any thread may call it. Threads are started when first needed and end with the process, or with :meth:`close`.

    Args:
        token_bytes: what each id adds to the text; ids without text (special ones) are never allowed.
        eos_token_ids: ids that end a text.
        cache_bytes: for compiled grammars that are kept.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], *, eos_token_ids: Collection[int], cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.vocab_size = len(token_bytes)
        self._token_bytes = token_bytes
        self._eos_token_ids = sorted(id_ for id_ in eos_token_ids if 0 <= id_ < self.vocab_size)
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, xgrammar.CompiledGrammar] = OrderedDict()
        self._cached_bytes = 0
        self._jobs: dict[_Key, _Job] = {}
        self._queue: SimpleQueue[_Key | None] = SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._native: dict[bool, xgrammar.GrammarCompiler] = {}
        self._native_lock = threading.Lock()

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> GrammarCompiler:
        """For a model of ``vocab_size`` ids, of which the tokenizer may use fewer; by default with its EOS."""
        used = range(min(tokenizer.used_vocab_size, vocab_size))
        token_bytes = [tokenizer.token_bytes(id_) for id_ in used]  # special tokens have none, so nothing matches them
        eos_token_ids = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
        return cls(token_bytes, eos_token_ids=eos_token_ids, cache_bytes=cache_bytes)

    def compile(self, spec: StructuredOutputs) -> Future[xgrammar.CompiledGrammar]:
        """The grammar, at once if it is kept.

        Returns:
            A future of the caller's own; its error is a RequestError whose field is "structured_outputs". Cancel it if
            nobody waits for it any more: what all have cancelled is not compiled.
        """
        key = (spec.kind, spec.source)
        result: Future[xgrammar.CompiledGrammar] = Future()
        with self._lock:
            known = self._cache.get(key)
            if known is None:
                job = self._jobs.get(key)
                if job is None:
                    job = self._jobs[key] = _Job(spec)
                    self._queue.put(key)
                job.waiting.append(result)
                self._start_workers()
                return result
            self._cache.move_to_end(key)
        result.set_result(known)
        return result

    def matcher(self, grammar: xgrammar.CompiledGrammar, token_ids: Sequence[int] = ()) -> Matcher:
        """The state of a request that has generated ``token_ids`` so far.

        Raises:
            RequestError: they don't follow the grammar.
        """
        from engine.structured.matcher import Matcher  # imports XGrammar

        return Matcher(grammar, self.vocab_size, token_ids)

    def close(self) -> None:
        """End the threads after what they are at, which may take its time and holds nobody up; may be called again."""
        with self._lock:
            workers, self._workers = self._workers, []
        for _ in workers:
            self._queue.put(None)

    def _start_workers(self) -> None:
        while len(self._workers) < WORKERS:
            # Daemons: a schema that takes for ever must not keep the process alive.
            self._workers.append(threading.Thread(target=self._work, name="grammar", daemon=True))
            self._workers[-1].start()

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            with self._lock:
                job = self._jobs[key]
                job.waiting = [one for one in job.waiting if not one.cancelled()]
                if not job.waiting:
                    del self._jobs[key]
                    continue
            grammar, failure = None, None
            try:
                grammar = self._compile(job.spec)
            except Exception as error:
                failure = error
            with self._lock:
                del self._jobs[key]
                if grammar is not None:
                    self._keep(key, grammar)
            for one in job.waiting:  # nobody joins them now that the job is off the list
                if one.set_running_or_notify_cancel():
                    if grammar is not None:
                        one.set_result(grammar)
                    else:
                        one.set_exception(failure)

    def _keep(self, key: _Key, grammar: xgrammar.CompiledGrammar) -> None:
        self._cache[key] = grammar
        self._cached_bytes += grammar.memory_size_bytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.memory_size_bytes

    def _compile(self, spec: StructuredOutputs) -> xgrammar.CompiledGrammar:
        if not self._eos_token_ids:
            raise RequestError(
                "structured_outputs needs a token that ends a text, and this model has none", field="structured_outputs"
            )
        native = self._native_compiler(json_only=spec.kind in ("json", "json_object"))
        try:
            match spec.kind:
                case "json":
                    return native.compile_json_schema(spec.source, max_whitespace_cnt=MAX_WHITESPACE)
                case "json_object":
                    return native.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MAX_WHITESPACE)
                case "regex":
                    return native.compile_regex(spec.source)
                case "choice":
                    return native.compile_grammar(_choice_grammar(json.loads(spec.source)))
                case _:
                    return native.compile_grammar(spec.source)
        except (RuntimeError, ValueError) as error:
            raise RequestError(
                f"structured_outputs: the {spec.kind} can't be used: {_reason(error)}", field="structured_outputs"
            ) from None

    def _native_compiler(self, *, json_only: bool) -> xgrammar.GrammarCompiler:
        with self._native_lock:
            if json_only not in self._native:
                import xgrammar

                # Control characters stand in no JSON, but XGrammar (0.2.8) lets a string of bounded length have them.
                never = _CONTROLS if json_only else _NOTHING
                info = xgrammar.TokenizerInfo(
                    [b"" if never.search(data) else data for data in self._token_bytes],
                    xgrammar.VocabType.RAW,
                    vocab_size=self.vocab_size,
                    stop_token_ids=self._eos_token_ids,
                )
                self._native[json_only] = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            return self._native[json_only]


def _choice_grammar(choices: Sequence[str]) -> str:
    """A grammar whose sentences are the given texts; a string of JSON's means the same in GBNF."""
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))


def _reason(error: Exception) -> str:
    """XGrammar's words, without the time and place in its sources that stand before them."""
    text = str(error).strip()
    if text.startswith("[") and ": " in text:
        text = text.split(": ", 1)[1]
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
