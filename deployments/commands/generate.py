"""``dibit generate``: the offline engine on the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from rich.console import Console

from engine import LLM, SamplingParams
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of ``dibit generate``."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    tensor_parallel_size: int
    as_json: bool


def run_generate(prompts: list[str], options: GenerateOptions) -> None:
    """Continue every prompt, or standard input if there is none, and write the texts to standard output.

    Raises:
        DibitError: the model or an option is wrong.
    """
    if not prompts:
        if sys.stdin.isatty():
            raise ConfigError("there is no prompt; give --prompt TEXT, or pipe a text in")
        prompts = [sys.stdin.read()]
    params = SamplingParams.parse(
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    status = Console(stderr=True)
    with status.status(f"Loading {options.model}"):
        llm = LLM(model=options.model, tensor_parallel_size=options.tensor_parallel_size)
    try:
        with status.status("Generating"):
            results = llm.generate(prompts, params)
    finally:
        llm.shutdown()
    out = sys.stdout
    for prompt, result in zip(prompts, results, strict=True):
        choice = result.outputs[0]
        if options.as_json:
            record = {
                "prompt": prompt,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "prompt_tokens": len(result.prompt_token_ids),
                "completion_tokens": len(choice.token_ids),
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            out.write(prompt + choice.text + "\n")
