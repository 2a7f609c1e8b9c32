"""``python -m tests.fuzz --requests 20000``: generated requests against the HTTP face, in one process.

A tenth comes from schemathesis and the API's own description, the rest from hypothesis; a synthetic engine answers all
but a few hundred, which a small real model answers. Ends with a traceback and the smallest request found that is
answered wrongly: with a 5xx, with something a client can't read, or not at all.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from tests.fuzz.fuzzer import Fuzzer, real, synthetic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="in all (default 20000)")
    parser.add_argument("--real", type=int, default=400, help="of these, answered by a real model (default 400)")
    parser.add_argument("--seed", type=int, default=None, help="of the generators; a random one by default")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    started = time.monotonic()
    total: Counter[int] = Counter()
    print(f"seed {seed}", flush=True)

    def show(name: str, fuzzer: Fuzzer) -> None:
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(fuzzer.statuses.items()))
        print(f"{time.monotonic() - started:6.0f} s  {name}: {fuzzer.sent} ({counts})", flush=True)

    by_schema = (options.requests - options.real) // 10
    by_hypothesis = options.requests - options.real - by_schema
    for name, make, schema, own in (
        ("real model", real, options.real // 10, options.real - options.real // 10),
        ("synthetic engine", synthetic, by_schema, by_hypothesis),
    ):
        with make() as fuzzer:
            for kind, send, count in (
                ("hypothesis", fuzzer.hypothesis, own),
                ("schemathesis", fuzzer.schemathesis, schema),
            ):
                if count > 0:
                    send(count, start=seed, progress=lambda n=name, k=kind, f=fuzzer: show(f"{n}, {k}", f))
            total += fuzzer.statuses
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(total.items()))
    print(f"{sum(total.values())} requests in {time.monotonic() - started:.0f} s, no 5xx ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
