"""The pages in a real browser, from disk and without network."""

from __future__ import annotations

import csv
import io

import pytest
from site_rows import HOSTILE

TASKS = "table[data-table='tasks']"
LANE = "section[id^='passive_labels-labels-untrained-quick-']"
TABLE = f"{LANE} table[data-table]"


def go(page, site, path, fragment=""):
    page.goto(f"{(site / path).as_uri()}{fragment}")
    return page


def column(page, place, table=TABLE):
    rows = page.locator(f"{table} > tbody > tr:visible")
    return [rows.nth(i).locator("th, td").nth(place).inner_text() for i in range(rows.count())]


def edges(page):
    texts = column(page, 1)
    known = [float(text.split()[0]) for text in texts if text != "–"]
    assert all(text == "–" for text in texts[len(known) :])  # what is missing is last, whichever way
    return known


@pytest.fixture
def board(page, site):
    return go(page, site, "boards/labels.html")


def test_a_click_sorts_and_says_so(board):
    assert edges(board) == sorted(edges(board), reverse=True)
    button = board.locator(f"{TABLE} thead button").nth(1)
    button.click()
    button.click()
    assert edges(board) == sorted(edges(board))
    assert board.locator(f"{TABLE} th[aria-sort]").count() == 1
    assert board.locator(f"{TABLE} th").nth(1).get_attribute("aria-sort") == "ascending"
    assert "by advantage over chance ascending" in board.locator(f"{LANE} .tools span").inner_text()
    board.locator(f"{TABLE} thead button").nth(0).click()
    assert column(board, 0) == sorted(column(board, 0), key=str.lower)


def test_sorting_works_by_keyboard_and_keeps_the_focus(board):
    button = board.locator(f"{TABLE} thead button").nth(1)
    button.focus()
    board.keyboard.press("Enter")
    board.keyboard.press("Space")
    assert edges(board) == sorted(edges(board))
    assert button.evaluate("node => node === document.activeElement")


def test_filtering_keeps_lines_with_all_words(board):
    board.locator(f"{LANE} input[type=search]").fill("lg")
    assert set(column(board, 0)) == {"llg", "idlg", "rlg", "dlg"}
    assert board.locator(f"{LANE} .tools span").inner_text().startswith("4 of 6 lines")


def test_a_choice_keeps_lines_of_one_value(page, site):
    go(page, site, "boards/labels.html")
    select = page.get_by_label("dataset")
    assert select.locator("option").all_inner_texts() == ["all", "cifar10", "mnist"]
    assert set(column(page, 2, TASKS)) == {"cifar10", "mnist"}
    select.select_option("mnist")
    assert set(column(page, 2, TASKS)) == {"mnist"}


def test_an_address_brings_back_what_was_seen(board, site, browser):
    board.locator(f"{TABLE} thead button").nth(0).click()
    board.locator(f"{LANE} input[type=search]").fill("lg")
    boxes = board.locator(f"{TABLE} tbody tr:visible input[type=checkbox]")
    boxes.nth(0).check()
    boxes.nth(2).check()
    address, lines, panel = board.url, column(board, 0), board.locator(f"{LANE} .compared").inner_text()
    assert address.partition("#")[2].startswith("passive_labels-labels-untrained-quick-")
    assert "sort=attack.asc" in address
    other = browser.new_page()
    other.goto(address)
    assert column(other, 0) == lines == sorted(lines)
    assert other.locator(f"{LANE} .compared").inner_text() == panel
    assert other.locator(f"{LANE} input[type=search]").input_value() == "lg"
    seen = "node => node.getBoundingClientRect().top < innerHeight && node.getBoundingClientRect().bottom > 0"
    assert other.locator(f"{LANE} .compared").evaluate(seen)
    other.close()


def test_lines_side_by_side_with_their_paired_difference(board):
    panel = board.locator(f"{LANE} .compared")
    assert not panel.is_visible()
    for name in ("llg", "ebi"):
        board.get_by_label(f"Compare {name}", exact=True).first.check()
    text = panel.inner_text()
    assert "llg minus ebi: 0." in text
    assert "can be told apart" in text
    assert panel.locator("thead th").all_inner_texts()[1:] == ["llg", "ebi"]


def test_the_visible_lines_are_downloaded_as_csv(board):
    board.locator(f"{LANE} input[type=search]").fill("llg")
    with board.expect_download() as waiting:
        board.locator(LANE).get_by_role("button", name="CSV of these lines").click()
    lines = list(csv.reader(io.StringIO(waiting.value.path().read_text())))
    assert len(lines) == 2
    line = dict(zip(*lines, strict=True))
    assert line["attack"] == "llg"
    value, low, high = (line[f"advantage over chance{part}"] for part in ("", " low", " high"))
    assert float(low) < float(value) < float(high)
    assert len(value) > 6  # not what is shown, with two decimals
    assert {line["tasks"], line["tasks of"]} == {"2"}


def test_a_csv_has_numbers_as_numbers_formulas_as_texts_and_nothing_where_nothing_is(page, site):
    go(page, site, "boards/labels.html")
    page.locator(TABLE).evaluate("""table => {
      const cells = table.tBodies[0].rows[0].cells;
      cells[0].textContent = '=1+1';
      Object.assign(cells[1].dataset, { v: '-0.04' });
      cells[1].textContent = '-0.0';
      cells[3].textContent = '';
      delete cells[3].dataset.v;
    }""")
    with page.expect_download() as waiting:
        page.locator(LANE).get_by_role("button", name="CSV of these lines").click()
    first, *others = csv.DictReader(io.StringIO(waiting.value.path().read_text()))
    assert (first["attack"], first["advantage over chance"], first["instance recall"]) == ("'=1+1", "-0.04", "")
    assert others[-1]["advantage over chance"] == ""  # dlg, which failed
    button = page.locator(f"{TABLE} thead button").nth(3)
    for _ in range(2):
        button.click()
        assert "'" not in column(page, 0)[0]
        assert "=1+1" not in column(page, 0)[:4]  # an empty place is no 0 and sorts last, whichever way


def test_a_hostile_name_is_shown_as_it_is(board):
    assert HOSTILE in column(board, 0)
    board.get_by_label(f"Compare {HOSTILE}", exact=True).first.check()
    board.get_by_label("Compare llg", exact=True).first.check()
    assert HOSTILE in board.locator(f"{LANE} .compared").inner_text()
    assert board.locator("img").count() == 0


@pytest.mark.parametrize("fragment", ["#ID~sort=99.desc&ID~is~x=x", "#%E0%A4%A&x=%", "#ID~sort=attack", "#="])
def test_an_address_that_makes_no_sense_does_no_harm(page, site, fragment):
    go(page, site, "boards/labels.html")
    name = page.locator(TABLE).get_attribute("data-table")
    go(page, site, "boards/labels.html", fragment.replace("ID", name))
    assert page.locator(TABLE).is_visible()


@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_without_a_script_tables_and_charts_are_complete(page, site):
    go(page, site, "boards/labels.html")
    assert page.locator(f"{TABLE} tbody tr").count() == 6
    assert page.locator("button, input").count() == 0
    assert page.locator("svg").first.is_visible()
    page.locator(f"{TABLE} tbody a", has_text="0.").first.click()
    assert page.locator("h1").inner_text() == "llg"
    page.locator("td a[href*='cells/']").first.click()
    assert page.locator("tbody tr[id]").count() == 12


@pytest.mark.parametrize("page", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_a_phone_scrolls_tables_and_not_the_page(page, site):
    for path in ("index.html", "boards/labels.html", "defenses.html", "compute.html"):
        go(page, site, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


@pytest.mark.parametrize("page", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_axe_finds_nothing_serious(page, site):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    found = (next(site.glob(f"{kind}/*.html")) for kind in ("cells/*", "measured/*", "gallery"))
    others = [path.relative_to(site).as_posix() for path in found]
    for path in ("index.html", "boards/labels.html", "heatmap.html", "localization.html", "download.html", *others):
        go(page, site, path)
        found = axe.run(page).response["violations"]
        serious = [
            (path, v["id"], v["nodes"][0]["html"][:150], v["nodes"][0].get("failureSummary", "")[:200])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == []
    page.problems.clear()  # axe itself asks for stylesheets, which the policy refuses
