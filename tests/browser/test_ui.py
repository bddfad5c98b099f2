"""The chat page in Chromium, on the real embedded model and a fake vLLM, with every other host unreachable."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import llm_inference as product
from tests.browser.chromium import DESKTOP, PHONE, Keys, Page, chromium
from tests.fake_engine import FakeEngine, Reply
from tests.harness import serving, until

NARROW = (360, 740)
KEY = "sk-browser"
ATTACKS = (
    "<script>document.title = 'stolen'</script>",
    "<img src=x onerror=\"document.title = 'stolen'\">",
    "[click](javascript:document.title='stolen') [data](data:text/html,x) <a href='javascript:1'>a</a>",
    "**<svg onload=\"document.title = 'stolen'\">** `<b>` # *<i>*",
    "1. <iframe srcdoc='<script>top.document.title = 1</script>'></iframe>",
    '[link](https://example.com/"onmouseover="alert(1))',
)
MARKDOWN = """# Title

Some **bold**, `code` and 2 * 3 * 4.
A second line.

1. one
   - nested
2. two

```python
if a < b:
    print("**no bold**")
```
end"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, FakeEngine]]:
    """The embedded engine as the default one, and a fake vLLM beside it."""
    with FakeEngine("vllm") as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BASE_URL", engine.base_url)
        app = product.create_app(product.Settings(engine="llamacpp"))
        with serving(app) as url:
            assert "vllm" in httpx.get(url + "/api/v1/llm/models", trust_env=False).text  # now it is attached
            yield url, engine
            until(lambda: app.state.gateway.in_flight == 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page, server: tuple[str, FakeEngine]) -> Iterator[Page]:
    """The page as it opens, in English at desktop size, with the fake vLLM chosen; its console must stay empty."""
    server[1].reset()
    opened(browser, server[0])
    choose(browser, "vllm/m")
    yield browser
    assert browser.errors() == []
    browser.network()
    assert browser.asked == []
    browser.open("about:blank")  # what still runs ends


@pytest.fixture
def engine(server: tuple[str, FakeEngine]) -> FakeEngine:
    return server[1]


def shot(page: Page, tmp_path: Path, name: str) -> None:
    page.shot(Path(os.environ.get("LLM_TEST_SHOTS", tmp_path)) / f"ui-{name}.png")


def opened(page: Page, url: str) -> None:
    page.open(url + "/ui")
    page.wait(lambda: page.all("#model option") or page.text("#status"))


def choose(page: Page, name: str) -> None:
    script = "const box = document.getElementById('model'); box.value = arguments[0]; box.onchange(); return box.value"
    assert page.driver.execute_script(script, name) == name


def setting(page: Page, name: str, value: str) -> None:
    page.driver.execute_script("document.getElementById('settings').open = true")
    box = page.all(f"#{name}")[0]
    box.clear()
    box.send_keys(value)


def ask(page: Page, text: str) -> None:
    page.all("#ask")[0].send_keys(text + "\n")


def finished(page: Page, timeout: float = 30) -> str:
    """The last answer with its notes, once it is there."""
    page.wait(lambda: page.text("#send") in ("Send", "发送") and page.all("article .note, article .error"), timeout)
    return str(page.text("article:last-of-type"))


def roles(engine: FakeEngine) -> list[str]:
    return [message["role"] for message in engine.body["messages"]]


# ------------------------------------------------------------------------------------------------ what it looks like


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_it_fits_in_both_languages(
    server: tuple[str, FakeEngine], language: str, size: tuple[int, int], dark: bool, tmp_path: Path
) -> None:
    server[1].reset().text = MARKDOWN + "\n" + "long" * 100
    with chromium(size, language, dark) as page:
        opened(page, server[0])
        demo = next(option.text for option in page.all("#model option") if "SmolLM2-135M" in option.text)
        choose(page, demo)
        name = f"{language}-{size[0]}-{'dark' if dark else 'light'}"
        shot(page, tmp_path, f"open-{name}")
        assert "--model Qwen/Qwen3-0.6B-GGUF:Q8_0" in page.text("#demo")
        assert not page.wide()
        choose(page, "vllm/m")
        assert not page.all("#demo")[0].is_displayed()
        ask(page, "Show everything.")
        figures = finished(page)
        assert not page.all("#examples")[0].is_displayed()
        page.driver.execute_script("document.getElementById('settings').open = true")
        shot(page, tmp_path, f"answer-{name}")
        assert not page.wide()
        words = (
            ("发送", "设置", "系统提示词", "回答的结构")
            if language == "zh-CN"
            else ("Send", "Settings", "System prompt")
        )
        assert all(word in page.text() for word in words)
        assert "tokens/s" in figures
        assert page.driver.execute_script("return document.documentElement.lang") == language
        assert page.driver.title == page.text("h1") == "llm_inference"
        page.network()
        assert page.asked == page.failed == page.errors() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_default_model_answers(server: tuple[str, FakeEngine], size: tuple[int, int], tmp_path: Path) -> None:
    with chromium(size) as page:
        opened(page, server[0])
        choose(page, next(option.text for option in page.all("#model option") if "llamacpp/" in option.text))
        page.all("#examples button")[0].click()
        assert page.all("#ask")[0].get_attribute("value") == page.text("#examples button").splitlines()[0]
        setting(page, "max_tokens", "60")
        page.all("#send")[0].click()
        assert "tokens/s" in finished(page, 90)
        shot(page, tmp_path, f"default-{size[0]}")


def test_the_policy_allows_this_origin_alone(server: tuple[str, FakeEngine]) -> None:
    reply = httpx.get(server[0] + "/ui", trust_env=False)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "innerHTML" not in reply.text and "://" not in reply.text


def test_the_root_leads_to_it(server: tuple[str, FakeEngine]) -> None:
    reply = httpx.get(server[0] + "/", trust_env=False, follow_redirects=True)
    assert reply.url.path == "/ui" and reply.headers["content-type"].startswith("text/html")


# ------------------------------------------------------------------------------------------------------ what it shows


def test_markdown_is_shown(page: Page, engine: FakeEngine) -> None:
    engine.text = MARKDOWN
    ask(page, "Show it.")
    finished(page)
    for css, text in {
        "b": "bold",
        "p code": "code",
        ".item": "1. one\n   • nested\n2. two",
        "pre": 'if a < b:\n    print("**no bold**")',
        "p:last-of-type": "end",
    }.items():
        assert page.text(f"article:last-of-type > div {css}") == text
    assert "# Title" in page.text("article") and "2 * 3 * 4" in page.text("article")


@pytest.mark.parametrize("attack", ATTACKS)
def test_html_in_an_answer_stays_text(page: Page, engine: FakeEngine, attack: str) -> None:
    engine.text = engine.reasoning = attack
    ask(page, attack)
    finished(page)
    assert page.driver.title == "llm_inference"
    foreign = "script, img, svg, iframe, a, [onerror], [onload], [onmouseover], [srcdoc]"
    assert not page.all(", ".join(f"article {css.strip()}" for css in foreign.split(",")))
    assert page.text(".user") == attack
    assert page.text(".reasoning") == attack


@pytest.mark.parametrize("attack", ATTACKS[:2])
def test_html_in_an_error_stays_text(page: Page, engine: FakeEngine, attack: str) -> None:
    body = product.to_json({"error": {"message": attack, "type": "BadRequestError", "code": 400}})
    engine.script(Reply(status=400, headers={"content-type": "application/json"}, pieces=[body]))
    ask(page, "Go.")
    assert "invalid_request" in finished(page)
    assert page.driver.title == "llm_inference" and not page.all("article .error *")
    page.errors()  # the browser logs the 400


@pytest.mark.parametrize(
    "text", ["*" * 20_000, "**a " * 5000, "[" * 20_000, "[a](http://" * 2000, "`" * 19_999, "> " * 9000, "1. " * 7000]
)
def test_no_text_takes_long_to_show(page: Page, text: str) -> None:
    script = """const began = performance.now()
    talk.append(...markdown(arguments[0]))
    return talk.scrollHeight && performance.now() - began"""
    assert page.driver.execute_script(script, text) < 1000


def test_reasoning_is_a_block_of_its_own(page: Page, engine: FakeEngine) -> None:
    engine.reasoning, engine.text, engine.pace = "thinking hard " * 20, "Forty-two. " * 10, 0.02
    ask(page, "Think.")
    page.wait(lambda: "thinking hard" in page.text(".reasoning"))
    finished(page)
    assert page.text(".reasoning").strip() == engine.reasoning.strip()
    assert page.text("article:last-of-type > div").strip() == engine.text.strip()


def test_a_cut_answer_is_marked(page: Page, engine: FakeEngine) -> None:
    engine.text = "word " * 50
    setting(page, "max_tokens", "5")
    ask(page, "Go on.")
    assert "Cut off by max_tokens" in finished(page) and page.all("article .warn")
    assert engine.body["max_tokens"] == 5 and "temperature" not in engine.body


def test_settings_reach_the_engine(page: Page, engine: FakeEngine) -> None:
    setting(page, "system", "Be brief.")
    setting(page, "temperature", "0")
    setting(page, "top_p", "0.5")
    ask(page, "Hello.")
    finished(page)
    asked = engine.body
    assert (asked["messages"][0], asked["temperature"], asked["top_p"]) == (
        {"role": "system", "content": "Be brief."},
        0,
        0.5,
    )


def test_a_schema_shows_the_checked_json(page: Page, engine: FakeEngine, tmp_path: Path) -> None:
    engine.text = '{"city":"<b>Paris</b>"}'
    setting(page, "schema", '{"city": "string"}')
    ask(page, "Where?")
    finished(page)
    shot(page, tmp_path, "schema")
    assert page.text("article pre") == '{\n  "city": "<b>Paris</b>"\n}'


@pytest.mark.parametrize(
    "name, value, message",
    [("schema", "{", "JSON schema: "), ("temperature", "9", "temperature: "), ("top_p", "-1", "top_p: ")],
)
def test_a_bad_setting_is_refused_by_name(page: Page, engine: FakeEngine, name: str, value: str, message: str) -> None:
    setting(page, name, value)
    ask(page, "Hello.")
    assert message in finished(page) and page.all("article .error[role=alert]")
    assert engine.bodies == [] and page.all("#ask")[0].get_attribute("value") == "Hello."
    page.errors()  # the browser logs the 400


# ----------------------------------------------------------------------------------------------- what may happen to it


def test_stop_ends_the_generation(page: Page, engine: FakeEngine, tmp_path: Path) -> None:
    engine.pace, engine.text = 0.05, "word " * 2000
    ask(page, "Go on for ever.")
    page.wait(lambda: "word word word" in page.text("article"))
    shot(page, tmp_path, "streaming")
    ask(page, "typed meanwhile")
    assert engine.live == 1 and page.text("#send") == "Stop" and len(page.all(".user")) == 1
    page.all("#send")[0].click()
    engine.wait(lambda: engine.live == 0)
    assert "Stopped" in finished(page) and "tokens/s" not in page.text("article")
    shot(page, tmp_path, "stopped")
    engine.reset().text = "and again"
    page.all("#ask")[0].clear()
    ask(page, "Now shortly.")
    page.wait(lambda: "and again" in page.text("article:last-of-type"))
    assert roles(engine) == ["user", "assistant", "user"] and "word" in engine.body["messages"][1]["content"]


def test_what_had_no_answer_is_no_part_of_the_history(page: Page, engine: FakeEngine) -> None:
    engine.script(Reply(delay=60))
    ask(page, "One.")
    engine.wait(lambda: engine.live == 1)
    page.all("#send")[0].click()
    assert "Stopped" in finished(page)
    engine.wait(lambda: engine.live == 0)
    assert page.all("#ask")[0].get_attribute("value") == "One."
    ask(page, " Two.")
    page.wait(lambda: "tokens" in page.text("article:last-of-type"))
    assert roles(engine) == ["user"] and engine.body["messages"][0]["content"] == "One. Two."


@pytest.mark.parametrize("silent", [False, True], ids=["while it talks", "before the first token"])
def test_leaving_ends_the_generation(page: Page, engine: FakeEngine, silent: bool) -> None:
    engine.pace, engine.text = 0.05, "word " * 2000
    if silent:
        engine.script(Reply(delay=60))
    ask(page, "Go on for ever.")
    engine.wait(lambda: engine.live == 1)
    page.open("about:blank")
    engine.wait(lambda: engine.live == 0)


def test_a_stream_that_breaks_is_an_error(page: Page, engine: FakeEngine, tmp_path: Path) -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Half a"}}]}
    headers = {"content-type": "text/event-stream"}
    engine.script(Reply(headers=headers, pieces=[b"data: " + product.to_json(chunk) + b"\n\n"], end="reset"))
    ask(page, "Go.")
    page.wait(lambda: page.all("article .error[role=alert]"))
    shot(page, tmp_path, "broken")
    assert "Half a" in page.text("article:last-of-type")


def stub_stream(page: Page, *events: dict[str, Any]) -> None:
    """The next answers are these events, from endpoint gpu1: what no server here sends."""
    script = """const real = fetch, headers = {"content-type": "text/event-stream", "x-endpoint": "gpu1"}
    window.fetch = (path, options) =>
      path == "/v1/models" ? real(path, options) : Promise.resolve(new Response(arguments[0], {headers}))"""
    envelopes = [{"code": 200, "msg": "success", "data": event} for event in events]
    page.driver.execute_script(script, "".join(f"data: {product.to_json(each).decode()}\n\n" for each in envelopes))


def test_an_end_without_the_final_event_is_an_error(page: Page) -> None:
    """As a proxy between browser and server leaves it."""
    stub_stream(page, {"delta": "Half"})
    ask(page, "Go.")
    assert "The connection failed." in finished(page) and page.all("article .error[role=alert]")


def test_endpoint_and_ignored_fields_are_shown(page: Page) -> None:
    stub_stream(page, {"finish_reason": "stop", "usage": None, "timing": {}, "ignored": ["top_p", "seed"]})
    ask(page, "Go.")
    shown = finished(page)
    assert "endpoint: gpu1" in shown and "ignored: top_p, seed" in shown


def test_a_server_that_is_gone_is_an_error(browser: Page) -> None:
    with FakeEngine("vllm") as engine:
        app = product.create_app(product.Settings(engine="vllm", base_url=engine.base_url))
        with serving(app) as url:
            opened(browser, url)
        ask(browser, "Anyone?")
        assert "The connection failed." in finished(browser)
        assert browser.all("#ask")[0].get_attribute("value") == "Anyone?"
    browser.errors()


def test_a_key_is_asked_for(browser: Page, tmp_path: Path) -> None:
    with FakeEngine("vllm") as engine:
        app = product.create_app(product.Settings(engine="vllm", base_url=engine.base_url, api_keys=(KEY,)))
        with serving(app) as url:
            opened(browser, url)
            assert "requires a valid API key" in browser.text("#status")
            key = browser.all("#key")[0]
            assert key.is_displayed() and browser.driver.switch_to.active_element == key
            shot(browser, tmp_path, "key")
            for wrong in ("wrong", "schlüssel"):
                browser.driver.execute_script("document.getElementById('status').textContent = ''")
                key.send_keys(wrong + "\n")
                browser.wait(lambda: "requires a valid API key" in browser.text("#status"))
                key.clear()
            key.send_keys(KEY + "\n")
            browser.wait(lambda: browser.all("#model option") and not browser.text("#status"))
            ask(browser, "Hello.")
            assert "tokens" in finished(browser)
            kept = "return [Object.keys(sessionStorage), Object.keys(localStorage), document.cookie, location.href]"
            assert browser.driver.execute_script(kept) == [[], [], "", url + "/ui"]
            engine.wait(lambda: engine.live == 0)
    browser.errors()  # the browser logs each 401


def test_keys_and_composition(page: Page, engine: FakeEngine) -> None:
    box = page.all("#ask")[0]
    box.send_keys("one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "two")
    assert box.get_attribute("value") == "one\ntwo"
    composing = (
        "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.driver.execute_script(composing, box)
    assert not page.all("article")
    box.send_keys(Keys.ENTER)
    finished(page)
    assert page.text(".user") == "one\ntwo" and engine.body["messages"][0]["content"] == "one\ntwo"
    assert page.driver.switch_to.active_element == box


def test_a_reader_further_up_stays_there(page: Page, engine: FakeEngine) -> None:
    engine.pace, engine.text = 0.01, "line of words\n\n" * 200
    ask(page, "Go on.")
    place = (
        "const talk = document.getElementById('talk'); return [talk.scrollTop, talk.scrollHeight - talk.clientHeight]"
    )

    def there() -> Any:
        return page.driver.execute_script(place)

    page.wait(lambda: there()[1] > 300 and there()[0] > 250)
    page.driver.execute_script("document.getElementById('talk').scrollTop = 50")
    height = there()[1]
    page.wait(lambda: there()[1] > height + 200)
    assert there()[0] == 50


def test_a_new_chat_forgets(page: Page, engine: FakeEngine) -> None:
    ask(page, "One.")
    finished(page)
    engine.pace, engine.text = 0.05, "word " * 2000
    ask(page, "Two.")
    engine.wait(lambda: engine.live == 1)
    page.all("#new")[0].click()
    engine.wait(lambda: engine.live == 0)
    assert not page.all("article") and page.all("#examples button")[0].is_displayed()
    engine.reset()
    ask(page, "Three.")
    finished(page)
    assert roles(engine) == ["user"]


def test_everything_has_a_name(page: Page) -> None:
    """What a screen reader says of each control."""
    script = """const named = node => node.ariaLabel || node.labels?.[0]?.textContent.trim() || node.textContent.trim()
    const controls = [...document.querySelectorAll("button, select, input, textarea, summary")]
    return controls.filter(node => !named(node)).map(node => node.outerHTML)"""
    assert page.driver.execute_script(script) == []
    assert page.all("#talk[role=log][tabindex='0']") and page.all("#status[role=alert]")
