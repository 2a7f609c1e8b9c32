"""What the scheduler knows of a sequence."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request is: a preempted one is ``WAITING`` again, and keeps its output tokens."""

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

    output_token_ids: list[int] = field(default_factory=list, init=False)
    all_token_ids: list[int] = field(init=False)
    """Prompt and output in one list, which only ever grows: the tokens that are *wanted* in the KV cache."""
    num_computed_tokens: int = field(default=0, init=False)
    """The first so many of ``all_token_ids`` are in the KV cache."""
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

    def __post_init__(self) -> None:
        self.all_token_ids = list(self.prompt_token_ids)

    @classmethod
    def from_message(cls, message: EngineRequest) -> Request:
        """Start the state of a request that has just come in."""
        return cls(message.request_id, message.prompt_token_ids, message.params, message.max_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.all_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Known tokens that are not in the KV cache yet: 1 while decoding."""
        return len(self.all_token_ids) - self.num_computed_tokens

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)
