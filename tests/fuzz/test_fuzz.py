"""A short run of the fuzzer; ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

import json

from deployments.openai.schema import OPERATIONS, describe
from tests.fuzz.fuzzer import real, synthetic


def test_nothing_a_client_sends_is_a_5xx() -> None:
    with synthetic() as fuzzer:
        fuzzer.hypothesis(300, start=0)
        fuzzer.schemathesis(40, start=0)
        assert fuzzer.statuses[200] >= 10, "the requests are all too broken to reach anything"
        assert fuzzer.statuses[400] >= 30


def test_nor_with_a_model_behind_it() -> None:
    with real() as fuzzer:
        fuzzer.hypothesis(40, start=1)


def test_the_description_covers_every_route() -> None:
    with synthetic() as fuzzer:
        routes = {
            (route.path.replace(":path}", "}"), method)
            for route in fuzzer.app.routes
            for method in route.methods - {"HEAD"}
        }
    described = {(operation.path, operation.method.upper()) for operation in OPERATIONS}
    assert described == routes - {("/openapi.json", "GET")}
    assert json.dumps(describe("tiny"))
