"""The page in a real browser: headless Chromium against a real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_server import Engine, PageServer, address, load

from deployments.observability.config import ObservabilityConfig
from deployments.page import FILES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/usr/bin", "/usr/lib/chromium", "/opt/google/chrome", "/snap/bin")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CANARY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    found = next((place for name in BROWSERS if (place := shutil.which(name, path=path))), None)
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(BROWSERS)} is in PATH, {', '.join(PLACES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def make_server() -> Iterator[Callable[..., PageServer]]:
    servers: list[PageServer] = []

    def make(config: ObservabilityConfig | None = None) -> PageServer:
        servers.append(PageServer(config))
        servers[-1].cluster.members = [
            Engine(address("h20", "alpha", max_num_seqs=8), load(running_requests=2, free_blocks=512)),
            Engine(address("a100", "beta"), load(waiting_requests=3)),
        ]
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., PageServer]) -> PageServer:
    return make_server()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; whatever the browser complains of fails the test, unless it is among ``allowed``."""
    contexts = []
    complaints: list[str] = []
    allowed: list[str] = []

    def open_(server: PageServer, *, allow: str | None = None, **options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        if allow:
            allowed.append(allow)
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not [text for text in complaints if not any(part in text for part in allowed)]


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_state_shows_pools_and_replicas_and_follows_them(server: PageServer, open_page: Callable[..., Any]) -> None:
    page = open_page(server)
    alpha = page.locator('[data-pool="h20"] .replica')
    sync_api.expect(alpha).to_contain_text("2 of 8 running")
    sync_api.expect(alpha).to_contain_text("512 of 1,024 pages")
    sync_api.expect(alpha.get_by_role("img", name="Batch: 2 of 8 running, 0 waiting")).to_be_visible()
    assert alpha.locator("svg").first.locator(".cell.on").count() == 2
    assert alpha.locator("svg").last.locator(".cell.on").count() == 72  # half of 144
    sync_api.expect(page.locator('[data-pool="a100"] .replica')).to_contain_text("3 waiting")
    sync_api.expect(page.locator("#status")).to_have_text("2 engines ready")
    sync_api.expect(page.locator("#model")).to_have_text("tiny")

    server.cluster.members[0].load = load(running_requests=7, free_blocks=0)
    server.cluster.members[1].retired = True
    server.cluster.members.append(Engine(address("a100", "gamma"), load()))
    sync_api.expect(alpha).to_contain_text("7 of 8 running")
    sync_api.expect(page.locator('[data-pool="a100"] .replica')).to_have_count(2)
    sync_api.expect(page.locator('.replica[data-state="draining"]')).to_contain_text("beta")
    sync_api.expect(page.locator("#status")).to_have_text("2 of 3 engines ready")

    del server.cluster.members[0]
    sync_api.expect(page.locator('[data-pool="h20"]')).to_have_count(0)
    sync_api.expect(page.locator("#banner")).to_be_hidden()


def test_says_when_there_is_no_engine(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.cluster.members = []
    server.cluster.held = 4
    page = open_page(server)
    sync_api.expect(page.locator("#banner")).to_contain_text("No engine is running")
    sync_api.expect(page.locator("#banner")).to_contain_text("4 requests waiting")
    sync_api.expect(page.locator("#status")).to_have_text("No engine")
    sync_api.expect(page.locator('[data-pool="a100"]')).to_contain_text("No engine here right now")
    server.cluster.members = [Engine(address("a100", "beta"), load())]
    sync_api.expect(page.locator("#banner")).to_be_hidden()


def test_many_replicas_become_tiles(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.cluster.members = [
        Engine(address("h20", f"r{i:03}"), load(waiting_requests=i % 2), ready=i > 0) for i in range(100)
    ]
    page = open_page(server)
    sync_api.expect(page.locator('[data-pool="h20"] .tiles > g')).to_have_count(100)
    sync_api.expect(page.locator('[data-pool="h20"] .replica')).to_have_count(0)
    assert page.locator(".tile-lost").count() == 1
    assert page.locator(".tile-wait").count() == 50
    server.cluster.members = server.cluster.members[1:3]
    sync_api.expect(page.locator('[data-pool="h20"] .replica')).to_have_count(2)
    sync_api.expect(page.locator('[data-pool="h20"] .tiles')).to_have_count(0)


def test_expert_load_is_drawn(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.experts.pools["h20"] = {1: [9, 9, 9, 9], 2: [36, 0, 0, 0]}
    page = open_page(server)
    canvas = page.locator("#experts canvas")
    sync_api.expect(canvas).to_have_attribute(
        "aria-label",
        "Load of the experts of pool h20: 2 layers × 4 experts, the busiest has 4.0 times its layer's mean",
    )
    alphas = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 4, 2).data].filter((_, i) => i % 4 == 3)")
    assert alphas == [102] * 4 + [255, 0, 0, 0]  # 1 / 2.5 of full, and more than that


def test_chat_streams_text_as_it_comes(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.script.may_go_on.clear()
    page = open_page(server)
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    page.click("#settings summary")
    page.fill("#temperature", "0.3")
    page.fill("#max-tokens", "77")
    say(page, "Hi")
    answer = page.locator(".message.assistant")
    sync_api.expect(answer.locator(".text")).to_have_text("Hello")
    sync_api.expect(page.locator("#send")).to_have_text("Stop")
    assert page.locator("#log").get_attribute("aria-busy") == "true"
    server.script.may_go_on.set()
    sync_api.expect(answer.locator(".text")).to_have_text("Hello there")
    sync_api.expect(answer.locator(".facts")).to_contain_text("2 tokens")
    sync_api.expect(page.locator("#send")).to_have_text("Send")
    say(page, "And?")
    sync_api.expect(answer).to_have_count(2)
    sync_api.expect(answer.last.locator(".facts")).to_contain_text("2 tokens")
    first, second = server.script.requests
    assert first["messages"] == [{"role": "user", "content": "Hi"}]
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == ("tiny", 0.3, 77, True)
    assert [message["content"] for message in second["messages"]] == ["Hi", "Hello there", "And?"]
    page.click("#clear")
    sync_api.expect(page.locator(".message")).to_have_count(0)


def test_stop_ends_the_request_and_keeps_what_came(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.script.may_go_on.clear()
    page = open_page(server)
    say(page, "Hi")
    answer = page.locator(".message.assistant")
    sync_api.expect(answer.locator(".text")).to_have_text("Hello")
    page.click("#send")
    sync_api.expect(answer.locator(".facts")).to_contain_text("stopped")
    sync_api.expect(answer.locator(".text")).to_have_text("Hello")
    sync_api.expect(page.locator("#send")).to_have_text("Send")
    server.script.may_go_on.set()
    assert server.script.left.wait(15)


def test_text_from_outside_stays_text(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.script.pieces = [CANARY[:9], CANARY[9:]]
    server.cluster.info.served_model_name = CANARY
    server.cluster.members = [Engine(address(CANARY, CANARY), load())]
    server.experts.pools[CANARY] = {0: [1, 2]}
    page = open_page(server)
    say(page, CANARY)
    sync_api.expect(page.locator(".message.assistant .text")).to_have_text(CANARY)
    sync_api.expect(page.locator(".message.user .text")).to_have_text(CANARY)
    sync_api.expect(page.locator(".pool h3").last).to_have_text(CANARY)
    sync_api.expect(page.locator(".replica b")).to_have_text(CANARY)
    sync_api.expect(page.locator("#model")).to_have_text(CANARY)
    sync_api.expect(page.locator("#experts h3")).to_have_text(CANARY)
    assert page.title().endswith("· Dibit")
    assert page.locator("img").count() == 1  # the mark beside the title
    assert page.locator("script").count() == 1


def test_asks_for_a_key_where_one_is_needed(server: PageServer, open_page: Callable[..., Any]) -> None:
    server.script.key = "secret"
    page = open_page(server, allow="401")
    say(page, "Hi")
    sync_api.expect(page.get_by_role("alert").filter(has_text="key")).to_have_text("Incorrect API key <b>provided</b>")
    sync_api.expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "secret")
    say(page, "Hi")
    sync_api.expect(page.locator(".message.assistant").last.locator(".text")).to_have_text("Hello there")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_says_when_the_state_is_not_shown(
    make_server: Callable[..., PageServer], open_page: Callable[..., Any]
) -> None:
    page = open_page(make_server(ObservabilityConfig(state=False)), allow="404")
    sync_api.expect(page.locator("#banner")).to_contain_text("observability.state is off")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_narrow_screen(server: PageServer, open_page: Callable[..., Any], scheme: str) -> None:
    server.script.pieces = ["x" * 500, " end"]
    server.cluster.members[0] = Engine(address("a-pool-of-a-rather-long-name-" * 3, "alpha" * 12), load())
    page = open_page(server, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    say(page, "y" * 300)
    sync_api.expect(page.locator(".message.assistant .text")).to_contain_text("end")
    sync_api.expect(page.locator(".pool")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("#settings summary")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_text_has_contrast_in_both_themes(server: PageServer, open_page: Callable[..., Any]) -> None:
    """4.5 to 1, as WCAG 2.1 AA asks for."""
    pairs = [("--ink", "--ground"), ("--ink", "--surface"), ("--ink", "--soft"), ("--muted", "--ground")]
    pairs += [("--muted", "--surface"), ("--accent-ink", "--accent"), ("--bad", "--surface"), ("--wait", "--surface")]
    script = """pairs => pairs.map(pair => {
        const [a, b] = pair.map(name => {
            const c = document.createElement('canvas').getContext('2d');
            c.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
            c.fillRect(0, 0, 1, 1);
            const [r, g, bl] = [...c.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * bl;
        });
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    })"""
    for scheme in ("light", "dark"):
        ratios = open_page(server, color_scheme=scheme).evaluate(script, pairs)
        assert {pair: ratio for pair, ratio in zip(pairs, ratios, strict=True) if ratio < 4.5} == {}, scheme


def test_everything_works_by_keyboard(server: PageServer, open_page: Callable[..., Any]) -> None:
    page = open_page(server)
    seen = []
    for _ in range(6):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert seen == ["A", "clear", "log", "prompt", "SUMMARY", "send"]
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).map(e => e.id)"
    )
    assert unnamed == []


def test_loads_nothing_from_elsewhere_and_runs_nothing_inline(
    server: PageServer, open_page: Callable[..., Any]
) -> None:
    page = open_page(server, allow="Content Security Policy")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    sync_api.expect(page.locator(".replica").first).to_be_visible()
    assert all(url.startswith(server.url) for url in asked)
    assert {"/" + url.removeprefix(server.url).partition("?")[0] for url in asked} == {*FILES, "/state"}
    inline = """() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
        return window.ran ?? 0;
    }"""
    assert page.evaluate(inline) == 0
