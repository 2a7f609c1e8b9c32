"""What the scheduler knows of a sequence."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from engine.messages import EngineRequest, TokenLogprobs
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.structured.matcher import Matcher


class RequestStatus(Enum):
    """Where a request is: a preempted one is ``WAITING`` again, and keeps its output tokens.

    ``HELD``: it can't be scheduled before something else is ready (its grammar).
    """

    HELD = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Request:
    """A sequence on its way: the tokens it has, how many of them are in the KV cache, and where.

    The scheduler changes it; everyone else reads. Token ``i`` lives in slot
    ``block_table[i // block_size] * block_size + i % block_size`` of the KV cache.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    output_token_ids: list[int] = field(default_factory=list)
    """At first those that another engine has generated."""
    priority: int = 0

    arrival: int = field(default=0, init=False)
    """Number of the request in the order of arrival."""
    submitted: float = field(default=0.0, init=False)
    """``time.perf_counter()`` when the request came in."""
    queued_seconds: float | None = field(default=None, init=False)
    """How long it waited from then until it was first scheduled."""
    num_given_tokens: int = field(init=False)
    """The first so many of ``output_token_ids`` came with the request."""
    all_token_ids: list[int] = field(init=False)
    """Prompt and output in one list, which only ever grows: the tokens that are *wanted* in the KV cache."""
    num_computed_tokens: int = field(default=0, init=False)
    """The first so many of ``all_token_ids`` are in the KV cache."""
    prefill_end: int = field(default=0, init=False)
    """So many of ``all_token_ids`` were known when the request last began to run; later ones are decoded."""
    num_cached_tokens: int = field(default=0, init=False)
    """Prompt tokens that were found in the KV cache when the request first ran."""
    num_preemptions: int = field(default=0, init=False)
    block_table: array[int] = field(default_factory=lambda: array("i"), init=False)
    """Int32 block ids; an array, because it becomes a row of a tensor in every step, and a list would take 8 times as
    long to convert."""
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    """Hash chain of the full blocks of ``all_token_ids``, as far as it was needed."""
    num_published_blocks: int = field(default=0, init=False)
    """The first so many blocks of ``block_table`` can be found by other requests."""
    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None, init=False)
    """An entry for each prompt token as far as they are known, None for the first; None where nobody asks for them."""
    grammar: Matcher | None = field(default=None, init=False)
    """Where it is in the grammar that it has to follow."""

    def __post_init__(self) -> None:
        self.num_given_tokens = len(self.output_token_ids)
        self.all_token_ids = [*self.prompt_token_ids, *self.output_token_ids]
        # Whoever generated output tokens has given the log probabilities of the prompt with the first of them.
        if self.params.prompt_logprobs is not None and not self.output_token_ids:
            self.prompt_logprobs = [None]

    @classmethod
    def from_message(cls, message: EngineRequest) -> Request:
        """Start the state of a request that has just come in."""
        return cls(
            message.request_id,
            message.prompt_token_ids,
            message.params,
            message.max_tokens,
            output_token_ids=list(message.output_token_ids),
            priority=message.priority,
        )

    @property
    def order(self) -> tuple[int, int]:
        """Requests are served in ascending order of this: by priority, then by arrival."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.all_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens that are not in the KV cache yet: 1 while decoding."""
        return len(self.all_token_ids) - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of prompt tokens are yet to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def num_skippable_tokens(self) -> int:
        """So many of the first tokens need not be computed if their keys and values are cached.

        The last token always is, as its logits are wanted; so are those of prompt tokens whose successor's log
        probability is asked for and not known yet.
        """
        if self.prompt_logprobs is not None and self.wants_prompt_logprobs:
            return len(self.prompt_logprobs) - 1
        return len(self.all_token_ids) - 1

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)
