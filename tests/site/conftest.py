"""A site of hand-made rows, and a browser to read it with."""

from __future__ import annotations

import json
import shutil

import pytest
from site_rows import HOSTILE, OPTIONS, site_rows, write_rows

from leakbench.site.build import build


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A folder of compacted rows and a reproduction."""
    folder = tmp_path_factory.mktemp("results")
    write_rows(folder / "rows.parquet", site_rows())
    line = {"setting": HOSTILE, "attack": "llg", "metric": "irec", "reference": 0.9, "ours": 0.88, "verdict": "agrees"}
    (folder / "reproduction.json").write_text(json.dumps([line]))
    return folder


@pytest.fixture(scope="session")
def site(results, tmp_path_factory):
    """The folder of its site."""
    return build([results], tmp_path_factory.mktemp("site"), OPTIONS).index.parent


@pytest.fixture(scope="session")
def browser():
    """Chromium of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request):
    """A page without network, which fails a test that left an error in its console."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
    opened = context.new_page()
    problems, asked = [], []
    opened.on(
        "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
    )
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.problems, opened.asked = problems, asked
    yield opened
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
