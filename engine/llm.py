"""The offline interface: a model in this process, prompts in, texts out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.chat.template import Message
from engine.checkpoint.hub import resolve_model
from engine.collect import Choice, Job
from engine.config import EngineConfig, ModelConfig
from engine.core import EngineCore
from engine.errors import ConfigError, EngineDeadError, RequestError
from engine.execution.executor import Executor
from engine.messages import TokenDelta
from engine.outputs import RequestOutput
from engine.requests import expand
from engine.sampling_params import SamplingParams
from engine.structured.compiler import GrammarCompiler
from engine.text.stream import TextStream
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class LLM:
    """A model on this machine. Not thread-safe. Use it as a context manager, or call :meth:`shutdown`.

    Args:
        model: the model's folder, or the name of its repository at the Hugging Face hub ("baidu/ERNIE-4.5-0.3B-PT").
        tensor_parallel_size: ranks; more than one start processes on this machine (so a script that does this needs the
            usual ``if __name__ == "__main__":``).
        max_model_len: tokens of a sequence at most; None takes the model's.
        progress: show loading and generation on the terminal; None does where standard error is one.
        options: other fields of :class:`engine.config.EngineConfig`.

    Raises:
        ConfigError: an option is unknown or out of range, or the model's files are malformed.
        UnsupportedError: the model is of a kind Dibit doesn't have.
        CheckpointError: there is no such model, or its weights don't fit its config.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        self._progress = sys.stderr.isatty() if progress is None else progress
        self._ids = itertools.count()
        self._failure: BaseException | None = None
        try:
            self.config = EngineConfig(
                model=str(resolve_model(model)),
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=max_model_len,
                **options,
            )
        except ValidationError as error:
            details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"engine options: {details}") from None
        self.model_config = ModelConfig.from_folder(self.config.model)
        self.tokenizer = Tokenizer.from_folder(self.config.model)
        with self._bars() as bars:
            executor = Executor.start_local(self.config, self.model_config, progress=_Loading(bars).update)
        try:
            self.max_model_len = executor.max_model_len
            self._used_vocab_size = min(self.tokenizer.used_vocab_size, self.model_config.vocab_size)
            eos_token_ids = {*self.tokenizer.eos_token_ids, *self.model_config.eos_token_ids}
            self._core = EngineCore(
                self.config,
                self.model_config,
                executor,
                used_vocab_size=self._used_vocab_size,
                eos_token_ids=eos_token_ids,
                grammars=GrammarCompiler.of(
                    self.tokenizer, eos_token_ids=eos_token_ids, vocab_size=self.model_config.vocab_size
                ),
            )
        except BaseException:
            executor.shutdown()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt.

        All prompts are checked before any is run (but whether ``structured_outputs`` can be used shows later, and ends
        them all). Choice ``i`` of ``n`` has a seed of its own, derived from the request's seed and ``i``
        (:func:`engine.seeds.choice_seed`); choice 0 has the seed itself.

        Args:
            prompts: text or token ids, one or several. Text is encoded with special tokens recognised: whoever calls
                this is the program, not its user. :meth:`chat` keeps what users say apart.
            sampling_params: one for all, or one for each prompt; the defaults where None.
            progress: as for the class.

        Returns:
            One output for each prompt, in their order.

        Raises:
            RequestError: a prompt or its parameters can't be served; ``field`` names what is wrong.
            EngineDeadError: the engine failed, now or before.
        """
        listed = _listed(prompts)
        jobs = [
            Job(
                prompt if isinstance(prompt, str) else None,
                self.tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else list(prompt),
            )
            for prompt in listed
        ]
        return self._run(jobs, sampling_params, self._progress if progress is None else progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; otherwise as :meth:`generate`.

        Args:
            messages: a list of ``{"role": …, "content": …}``, or a list of such lists.
            template_variables: for the chat template (``tools``, …).
        """
        if not messages:
            return []
        conversations = cast(
            "Sequence[Sequence[Message]]", [messages] if isinstance(messages[0], Mapping) else list(messages)
        )
        jobs = [
            Job(None, self.tokenizer.encode_chat(conversation, **template_variables)) for conversation in conversations
        ]
        return self._run(jobs, sampling_params, self._progress if progress is None else progress)

    def shutdown(self) -> None:
        """Free the model and end the other ranks; may be called again."""
        self._core.shutdown()
        self._failure = self._failure or EngineDeadError("the engine was shut down")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(
        self, jobs: list[Job], sampling_params: SamplingParams | Sequence[SamplingParams] | None, progress: bool
    ) -> list[RequestOutput]:
        if self._failure is not None:
            raise EngineDeadError(f"the engine is gone: {self._failure}; make a new LLM") from self._failure
        choices: dict[str, Choice] = {}
        for job, params in zip(jobs, _params_for(jobs, sampling_params), strict=True):
            job.request_id = str(next(self._ids))
            for request in expand(
                job.prompt_token_ids,
                params,
                max_model_len=self.max_model_len,
                request_id=job.request_id,
                used_vocab_size=self._used_vocab_size,
            ):
                choice = Choice(request, TextStream(self.tokenizer, request.params))
                job.choices.append(choice)
                choices[request.request_id] = choice
        under_way = dict(choices)
        try:
            for choice in choices.values():
                self._core.add(choice.request)
            with self._bars(enabled=progress) as bars:
                task = bars.add_task("generating", total=len(choices))
                while under_way:
                    for delta in self._step():
                        if under_way[delta.request_id].take(delta):
                            del under_way[delta.request_id]
                            if delta.finish_reason is None:  # a stop string: the engine doesn't know
                                self._core.abort([delta.request_id])
                            bars.advance(task)
        finally:
            self._core.abort(list(under_way))
        return [job.output(self.tokenizer) for job in jobs]

    def _step(self) -> list[TokenDelta]:
        try:
            self._core.wait()
            output = self._core.step()
        except Exception as error:
            self._failure = error
            raise
        for refusal in output.refused.values():
            raise refusal
        return output.deltas

    @contextmanager
    def _bars(self, enabled: bool | None = None) -> Iterator[Progress]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self._progress if enabled is None else enabled),
            transient=True,
        ) as bars:
            yield bars


class _Loading:
    """Shows what a loader reports: ``(what, bytes done, bytes in all)``."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("loading", total=None)

    def update(self, what: str, done: int, total: int) -> None:
        mebi = 1 << 20
        self._bars.update(self._task, description=f"{what} (MiB)", completed=done // mebi, total=total // mebi)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(token, int) for token in prompts):
        return [cast("Sequence[int]", prompts)]
    for prompt in prompts:
        if not isinstance(prompt, (str, Sequence)) or any(
            not isinstance(token, int) for token in (() if isinstance(prompt, str) else prompt)
        ):
            raise RequestError(f"prompts holds {prompt!r:.80}; expected text or a list of token ids", field="prompt")
    return list(cast("Sequence[Prompt]", prompts))


def _params_for(
    jobs: list[Job], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * len(jobs)
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * len(jobs)
    if len(sampling_params) != len(jobs):
        raise RequestError(
            f"{len(sampling_params)} sampling parameters for {len(jobs)} prompts; give one, or one for each",
            field="sampling_params",
        )
    return list(sampling_params)
