"""/docs and /redoc in Chromium; no other host can be reached."""

import os
from pathlib import Path

import pytest

import llm_inference as product
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium
from tests.harness import Stand, serving

pytest.importorskip("fastapi_offline")
KEY = "sk-docs"
GENERATE = "#operations-llm-generate_api_v1_llm_generate_post"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_needs_no_other_host(path: str, size: tuple[int, int], tmp_path: Path) -> None:
    with Stand("vllm") as stand, chromium(size) as page:
        page.open(stand.url + path)
        page.wait(lambda: "structured-generate" in page.text() or "Answer with checked JSON" in page.text())
        page.shot(Path(os.environ.get("LLM_TEST_SHOTS", tmp_path)) / f"{path[1:]}-{size[0]}.png")
        page.network()
        # beside ReDoc's "API docs by Redocly", inside its script: the one thing that is missing
        logo = "https://cdn.redoc.ly/redoc/logo-mini.svg"
        assert not {*page.asked} - {logo} and not page.failed and all(logo in error for error in page.errors())


def click(page: Page, css: str) -> None:
    page.wait(lambda: page.all(css))
    script = "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()"
    page.driver.execute_script(script, page.all(css)[0])


def shot(page: Page, tmp_path: Path, name: str) -> None:
    page.shot(Path(os.environ.get("LLM_TEST_SHOTS", tmp_path)) / f"{name}.png")


def test_an_example_runs_from_the_page(tmp_path: Path) -> None:
    with Stand("vllm") as stand, chromium() as page:
        page.open(stand.url + "/docs")
        for css in (f"{GENERATE} .opblock-summary-control", ".try-out__btn", "button.execute"):
            click(page, css)
        page.wait(lambda: '"msg": "success"' in page.text(".live-responses-table"))
        shot(page, tmp_path, "docs-executed")
        assert stand.engine.body["messages"][-1]["content"] == product.FIRST_PROMPT
        assert page.errors() == []


def test_authorize_sends_the_key(tmp_path: Path) -> None:
    with Stand("vllm", api_keys=(KEY,)) as stand, chromium() as page:
        page.open(stand.url + "/docs")
        for css in (f"{GENERATE} .opblock-summary-control", ".try-out__btn", "button.execute"):
            click(page, css)
        page.wait(lambda: "unauthorized: " in page.text(".live-responses-table"))
        assert stand.engine.bodies == []
        click(page, ".scheme-container button.authorize")
        page.wait(lambda: page.all(".auth-container input"))
        page.all(".auth-container input")[0].send_keys(KEY)
        shot(page, tmp_path, "docs-authorize")
        click(page, ".auth-container button.authorize")
        click(page, ".auth-container .btn-done")
        click(page, "button.execute")
        page.wait(lambda: '"msg": "success"' in page.text(".live-responses-table"))
        assert len(page.errors()) == 1  # the browser logs the 401


def executed(page: Page, operation: str) -> str:
    """What the page shows after "Try it out" and "Execute" on an operation as it stands: its status."""
    block = f'[id="{operation}"]'
    click(page, f"{block} .opblock-summary-control")
    click(page, f"{block} .try-out__btn")
    click(page, f"{block} button.execute")
    shown = f"{block} .live-responses-table .response-col_status"
    page.wait(lambda: page.text(shown).strip().split("\n")[-1][:3].isdigit(), 60)
    status = page.text(shown).strip().split("\n")[-1][:3]
    click(page, f"{block} .opblock-summary-control")
    return status


def test_every_example_is_answered_as_it_stands() -> None:
    """All but the two that name a model of Ollama and of vLLM: the default one can neither embed nor rerank."""
    app = product.create_app(product.Settings(engine="llamacpp"))
    with serving(app) as url, chromium() as page:
        page.open(url + "/docs")
        page.wait(lambda: "structured-generate" in page.text())
        operations = [each.get_attribute("id") for each in page.all(".opblock")]
        answers = {operation: executed(page, operation) for operation in operations}
        page.errors()  # the browser logs the two refusals
    assert len(answers) >= 17
    refused = {operation for operation, status in answers.items() if status != "200"}
    assert len(refused) == 2 and all("embeddings" in each or "rerank" in each for each in refused), answers


@pytest.mark.parametrize("path", ["/", "/ui", "/docs", "/redoc"])
def test_no_page_leaves_an_error_in_the_console(path: str) -> None:
    with Stand("vllm") as stand, chromium() as page:
        page.open(stand.url + path)
        page.wait(lambda: page.text().count("\n") > 3)
        page.network()
        assert page.failed == [] and [error for error in page.errors() if "cdn.redoc.ly" not in error] == []
        assert page.driver.current_url == stand.url + {"/": "/ui"}.get(path, path)
