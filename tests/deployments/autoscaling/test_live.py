"""A real pool under Serve: none, one, two replicas and none again, while clients ask, and no request is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from conftest import ENGINE
from probe import greedy

TOKENS = 150
CLIENTS = 12
AUTOSCALING = {
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 2.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.0,
    "start_s": 5.0,
}


def test_replicas_come_with_the_load_and_go_without_it(application: Callable[..., Any]) -> None:
    pool = {
        "name": "tide",
        "engine": {"max_num_seqs": 4},  # so that a dozen clients are more than one engine takes
        "replicas": {"min": 0, "max": 2},
        "autoscaling": AUTOSCALING,
    }
    answers: list[int] = []
    enough = threading.Event()

    def ask(client: int) -> None:
        number = 0
        while not enough.is_set():
            number += 1
            request = greedy(f"client-{client}-{number}", [1 + client, 2, 3], TOKENS)
            token_ids, _ = probe.generate.remote(request).result(timeout_s=240)
            answers.append(len(token_ids))

    assert ENGINE["max_num_seqs"] > 4
    with application("tide", pools=[pool]) as probe:
        assert probe.loads.remote().result(timeout_s=60) == []
        clients = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            probe.until_engines.remote(1).result(timeout_s=240)
            probe.until_engines.remote(2).result(timeout_s=240)
        finally:
            enough.set()
            for client in clients:
                client.join()
        probe.until_engines.remote(0).result(timeout_s=240)
        assert len(answers) >= CLIENTS
        assert set(answers) == {TOKENS}
