"""/docs and /redoc in Chromium; no other host can be reached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser.chromium import DESKTOP, PHONE, By, chromium
from tests.harness import Stand

pytest.importorskip("fastapi_offline")


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


def test_an_example_runs_from_the_page(tmp_path: Path) -> None:
    with Stand("vllm") as stand, chromium() as page:
        page.open(stand.url + "/docs")
        page.wait(lambda: page.all("#operations-llm-generate_api_v1_llm_generate_post"))
        for css in (
            "#operations-llm-generate_api_v1_llm_generate_post .opblock-summary-control",
            ".try-out__btn",
            "button.execute",
        ):
            page.wait(lambda css=css: page.all(css))  # type: ignore[misc]
            page.driver.execute_script(
                "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()",
                page.driver.find_element(By.CSS_SELECTOR, css),
            )
        page.wait(lambda: '"msg": "success"' in page.text(".live-responses-table"))
        page.shot(Path(os.environ.get("LLM_TEST_SHOTS", tmp_path)) / "docs-executed.png")
        assert stand.engine.bodies[0]["messages"][-1]["content"] == "用一句话介绍北京。"
