"""Rows, logits, draws and the meaning of the filters, for the tests of sampling."""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.execution.sampler import Sampler, SamplingRow
from engine.sampling_params import SamplingParams

VOCAB, USED, EOS = 40, 33, 2


def row(position=0, prompt=(), output=(), **options):
    options.setdefault("seed", 0)
    return SamplingRow(SamplingParams(**options), list(prompt), list(output), position)


def logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_kept(scores, *, top_k, top_p, min_p):
    """Kept tokens of one row, by the definitions, with plain Python."""
    kept = {i for i, score in enumerate(scores) if score > -math.inf}
    if top_k > 0:
        kth = sorted(scores, reverse=True)[:top_k][-1]
        kept = {i for i in kept if scores[i] >= kth}
    if top_p < 1:
        total = math.fsum(math.exp(scores[i]) for i in kept)
        mass, last = 0.0, None
        for score in sorted((scores[i] for i in kept), reverse=True):
            if last is not None and mass >= top_p:
                break
            mass += math.exp(score) / total
            last = score
        kept = {i for i in kept if scores[i] >= last}
    best = max(scores)
    return {i for i in kept if not min_p or scores[i] - best >= math.log(min_p)}


def draw(values, count, **options):
    """Tokens drawn at ``count`` positions from one row of logits."""
    sampler = Sampler(values.shape[-1], values.shape[-1], [])
    params = SamplingParams(**{"seed": 0, **options})
    rows = [SamplingRow(params, [], [], position) for position in range(count)]
    return np.array([sampled.token_id for sampled in sampler(values.expand(count, -1), rows)])
