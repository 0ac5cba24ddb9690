"""A site of hand-made rows, and a browser to read it with."""

from __future__ import annotations

import json
import shutil

import pytest
from site_rows import HOSTILE, INPUTS, LABELS, OPTIONS, site_rows, write_measures, write_pictures, write_rows

from leakbench.site.build import build


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A folder of rows, measures, pictures, a reproduction and claims."""
    folder = tmp_path_factory.mktemp("results")
    write_rows(folder / "rows.parquet", site_rows())
    write_measures(folder)
    write_pictures(folder)
    line = {"setting": HOSTILE, "attack": "llg", "metric": "irec", "reference": 0.9, "ours": 0.88, "verdict": "agrees"}
    (folder / "reproduction.json").write_text(json.dumps([line | {"task": LABELS.id, "defense": "topk"}]))
    claim = {"claim": "first layers hold most", "verdict": "undecided", "agree": 0, "differ": 1, "undecided": 1}
    lines = [{"setting": INPUTS.id, "quantity": "sensitivity_share", "more": 0.7, "less": 0.3, "verdict": "differs"}]
    said = "{kind: attack, name: dlg, version: 1, by: its author <b>, link: https://example.org/said}"
    (folder / "statements.yaml").write_text(f"confirmed: [{said}]\n")
    (folder / "claims.json").write_text(json.dumps({"claims": [claim], "comparisons": lines}))
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
    context.set_default_timeout(5000)
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
