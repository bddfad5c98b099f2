"""The chat page in Chromium, with the real embedded model and a fake vLLM; no other host can be reached."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm_inference as product
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium
from tests.fake_engine import FakeEngine, Reply
from tests.harness import serving, until

pytest.importorskip("gradio", reason="pip install -r tests/browser/requirements.txt")


MARKDOWN = (
    "# 标题\n\n**粗体** 和 `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<script>document.title = 'stolen'</script>"
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, FakeEngine]]:
    """The embedded engine as the default one, and a fake vLLM where VLLM_BASE_URL says."""
    with FakeEngine("vllm") as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BASE_URL", engine.base_url)
        app = product.create_app(product.Settings(engine="llamacpp"))
        with serving(app) as url:
            assert (
                "vllm" in httpx.get(url + "/api/v1/llm/models", trust_env=False).text
            )  # attached to now, for the tests' own environment is cleared
            yield url, engine
            until(lambda: app.state.gateway.in_flight == 0)


def shot(page: Page, tmp_path: Path, name: str) -> None:
    page.shot(Path(os.environ.get("LLM_TEST_SHOTS", tmp_path)) / f"ui-{name}.png")


def opened(page: Page, url: str) -> None:
    page.open(url + "/ui")
    page.wait(
        lambda: page.all("textarea") and any("llamacpp/" in str(box.get_attribute("value")) for box in model_box(page))
    )


def model_box(page: Page) -> list[Any]:
    return page.all("input[aria-label='Engine and model']")


def ask(page: Page, text: str) -> None:
    box = page.wait(lambda: (page.all("textarea") or [None])[-1])
    box.send_keys(text)
    page.wait(lambda: box.get_attribute("value") == text)
    box.send_keys("\n")


def answers(page: Page) -> str:
    return page.text("[aria-label='chatbot conversation']") or page.text(".bot.message")


def stop_buttons(page: Page) -> list[object]:
    return [button for button in page.all("button.stop-button") if button.is_displayed()]


def choose(page: Page, name: str) -> None:
    model_box(page)[0].click()
    page.wait(lambda: [option.click() for option in page.all("[role=option]") if name in option.text])


def settings(page: Page) -> None:
    """Open them: system prompt and schema are the first two text areas then, the message's is the last."""
    page.all("button.label-wrap")[0].click()
    page.wait(lambda: len(page.all("textarea")) == 3)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_an_answer_on_the_page_shows_its_figures(
    server: tuple[str, FakeEngine], size: tuple[int, int], tmp_path: Path
) -> None:
    with chromium(size) as page:
        opened(page, server[0])
        ask(page, "请用一句话介绍北京。 What is the capital of France?")
        page.wait(lambda: "tokens/s" in answers(page), 90)
        shot(page, tmp_path, f"answer-{size[0]}")
        assert "first token" in answers(page) and "北京" in page.text() and not page.wide()
        page.network()
        missing = ("/manifest.json", "/favicon.ico")  # gradio asks for them at the root, where they are not
        assert not page.asked and not [url for url in page.failed if not url.endswith(missing)]


def test_stop_ends_the_generation(server: tuple[str, FakeEngine], tmp_path: Path) -> None:
    url, engine = server
    engine.reset().pace, engine.text = 0.05, "word " * 2000
    with chromium() as page:
        opened(page, url)
        choose(page, "vllm/")
        ask(page, "Go on for ever.")
        page.wait(lambda: "word word word" in answers(page))
        assert engine.live == 1
        shot(page, tmp_path, "streaming")
        page.wait(lambda: stop_buttons(page))[0].click()
        engine.wait(lambda: engine.live == 0)
        kept = answers(page)
        page.wait(lambda: not stop_buttons(page))
        assert "tokens/s" not in kept and kept.count("word") < 1000

        engine.reset().text = "and again"  # the next turn carries the stopped one's words, and none of the figures
        ask(page, "Now shortly.")
        page.wait(lambda: "and again" in answers(page) and "tokens" in answers(page))
        roles = [message["role"] for message in engine.bodies[-1]["messages"]]
        assert roles == ["user", "assistant", "user"] and "word" in str(engine.bodies[-1]["messages"][1])


@pytest.mark.parametrize("silent", [False, True], ids=["while it talks", "before the first token"])
def test_leaving_ends_the_generation(server: tuple[str, FakeEngine], silent: bool) -> None:
    url, engine = server
    engine.reset().pace, engine.text = 0.05, "word " * 2000
    if silent:
        engine.script(Reply(delay=60))
    with chromium() as page:
        opened(page, url)
        choose(page, "vllm/")
        ask(page, "Go on for ever.")
        engine.wait(lambda: engine.live == 1)
    engine.wait(lambda: engine.live == 0)


@pytest.mark.parametrize("listens", [True, False])
def test_an_answer_that_is_never_read_is_ended(
    server: tuple[str, FakeEngine], listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = server
    monkeypatch.setattr(product.ChatPage, "PATIENCE", 1.0)
    engine.reset().pace, engine.text = 0.05, "word " * 2000
    with chromium() as page:
        opened(page, url)
        choose(page, "vllm/")
        if not listens:
            monkeypatch.setattr(
                product.ChatPage, "ROUTES", re.compile(product.ChatPage.ROUTES.pattern.replace("queue/data|", ""))
            )
        ask(page, "Go on for ever.")
        engine.wait(lambda: engine.live == 1)
        if listens:
            page.wait(lambda: answers(page).count("word") > 60)  # for three times as long as a reader may take to come
            assert engine.live == 1
        else:
            engine.wait(lambda: engine.live == 0, 15)


def test_markdown_is_shown_and_html_is_not_run(server: tuple[str, FakeEngine], tmp_path: Path) -> None:
    url, engine = server
    engine.reset().text = MARKDOWN
    with chromium() as page:
        opened(page, url)
        choose(page, "vllm/")
        settings(page)
        page.all("textarea")[0].send_keys("Be brief.")
        ask(page, "Show it.")
        page.wait(lambda: page.all(".message table") and page.all(".message h1") and page.all(".message strong"))
        shot(page, tmp_path, "markdown")
        assert page.driver.title != "stolen" and not page.all(".message script")
        asked = engine.bodies[-1]
        assert (
            asked["messages"][0] == {"role": "system", "content": "Be brief."}
            and asked["temperature"] == 0.7
            and asked["max_tokens"] == 512
        )


def test_a_schema_shows_the_checked_json(server: tuple[str, FakeEngine], tmp_path: Path) -> None:
    with chromium(PHONE) as page:
        opened(page, server[0])
        settings(page)
        page.all("textarea")[1].send_keys('{"country": {"enum": ["France", "Italy"]}}')
        ask(page, "Where is Paris?")
        page.wait(lambda: "tokens" in answers(page) or "invalid" in answers(page), 90)
        page.wait(lambda: page.all(".message pre code"))
        shot(page, tmp_path, "schema")
        assert '"country": "' in answers(page)


def test_an_error_is_shown_with_its_hint(server: tuple[str, FakeEngine], tmp_path: Path) -> None:
    with chromium() as page:
        opened(page, server[0])
        settings(page)
        page.all("textarea")[1].send_keys('{"country": "strin"}')
        ask(page, "Where is Paris?")
        page.wait(lambda: "invalid_request" in answers(page) and "one of string" in answers(page))
        shot(page, tmp_path, "error")


@pytest.mark.parametrize(
    "path",
    [
        "upload",
        "file=/etc/passwd",
        "proxy=http://127.0.0.1/",
        "vibe-edit",
        "run/other",
        "info",
        "../gradio_api/upload",
        "queue/join/../../upload",
    ],
)
def test_no_other_route_of_gradio_is_exposed(server: tuple[str, FakeEngine], path: str) -> None:
    for method in ("GET", "POST"):
        reply = httpx.request(method, f"{server[0]}/ui/gradio_api/{path}", json={}, trust_env=False)
        assert reply.status_code == 404 and reply.headers["x-error-kind"] == "not_found"


def test_a_local_file_is_not_served_as_an_asset(server: tuple[str, FakeEngine]) -> None:
    for path in ("assets/../../../../etc/passwd", "static/%2e%2e/%2e%2e/routes.py", "assets//etc/passwd"):
        assert httpx.get(f"{server[0]}/ui/{path}", trust_env=False).status_code in (403, 404)
