"""The pages as files: complete without a script, escaped, linked, and the same for the same rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from site_rows import HOSTILE, INPUTS, OPTIONS, site_rows, write_rows

from leakbench import gallery as gallery_rules
from leakbench.board import curves
from leakbench.board.defenses import TABLE_KEYS
from leakbench.board.lanes import LaneTable
from leakbench.errors import UserError
from leakbench.site import citing, profiles
from leakbench.site.build import build, digest
from leakbench.site.data import Options, slug
from leakbench.site.loading import load
from leakbench.site.pages import defenses, gallery, heatmap, localization, reproductions
from leakbench.site.pages.versions import history
from leakbench.store import write_job


class Read(HTMLParser):
    """Tags, links, ids and scripts of a page; open tags have to be closed."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "circle", "line", "rect", "path"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open, self.headings = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def read(site):
    return {path.relative_to(site).as_posix(): Read(path.read_text()) for path in site.rglob("*.html")}


def test_every_tag_is_closed_and_every_id_is_unique(read):
    assert len(read) > 30
    for name, page in read.items():
        assert page.open == [], name
        assert len(page.ids) == len(set(page.ids)), name


def test_every_link_leads_to_a_file_and_an_anchor_of_the_site(site, read):
    for name, page in read.items():
        for link in page.links:
            if link == "https://example.org/said":  # a statement's: the only ones that leave the site
                continue
            target, _, anchor = link.partition("#")
            assert "://" not in link, (name, link)
            path = ((site / name).parent / target).resolve() if target else (site / name).resolve()
            assert path.is_file(), (name, link)
            if anchor and path.suffix == ".html":
                assert anchor in read[path.relative_to(site.resolve()).as_posix()].ids, (name, link)


def test_what_strangers_wrote_is_text_and_never_markup(site, read):
    told = [path for path in site.rglob("*.html") if "onerror" in path.read_text()]
    assert len(told) >= 5  # boards, its own page, a task, rows, the reproduction
    for page in read.values():
        assert not [tag for tag, attrs in page.tags if "onerror" in attrs]
        scripts = [attrs for tag, attrs in page.tags if tag == "script"]
        assert all("src" in attrs or attrs.get("type") == "application/json" for attrs in scripts)
        assert not [attrs for _, attrs in page.tags if "style" in attrs or any(key.startswith("on") for key in attrs)]
    assert all(re.fullmatch(r"[a-z0-9_./-]+", path.relative_to(site).as_posix()) for path in site.rglob("*"))


def test_names_that_differ_have_files_that_differ():
    names = ["llg", "LLG", "l/l/g", "../llg", "", HOSTILE, "a b", "a-b", "x" * 200, "x" * 201]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("llg") == "llg"


def test_every_table_has_a_caption_and_scopes_and_pages_a_policy(read):
    for name, page in read.items():
        tags = [tag for tag, _ in page.tags]
        assert tags.count("table") == tags.count("caption"), name
        assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th"), name
        assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img"), name
        policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(policies) == 1
        assert policies[0].startswith("default-src 'none'")
        assert "unsafe" not in policies[0]
        assert tags.count("h1") == 1, name


def test_every_number_of_a_task_leads_to_rows_that_name_their_command(site):
    (task,) = (site / "tasks").glob("mnist-mlp-untrained-b1-iid-gradient-labels-*.html")
    links = set(re.findall(r'href="\.\./(cells/[^"]+)"', task.read_text()))
    assert len(links) == 11  # five attacks, twice, and one that failed
    rows = site_rows()
    for link in links:
        text = (site / link).read_text()
        assert len(re.findall(r"<tr id=", text)) == 12
        job, trial = re.search(r"leakbench reproduce (\S+):(\d+)</code>", text).groups()
        assert any(row["job_id"] == job and row["trial"] == int(trial) for row in rows)


def test_the_mean_of_a_cell_is_on_the_boards_and_on_its_page(site):
    own = [r["instance_recall"] for r in site_rows() if r["job_id"] == "llgnone1" and r["target"] == "labels"]
    mean = sum(own) / len(own)
    text = (site / "attacks/llg.html").read_text()
    link = re.search(rf'href="\.\./(cells/[^"]+)">{mean:.2f}<', text)
    assert link
    assert f"mean {mean:.4g} [" in (site / link[1]).read_text()


def test_pages_show_rank_intervals_and_what_can_be_detected(site):
    text = (site / "boards/labels.html").read_text()
    assert "Minimum detectable difference: 0." in text
    assert re.search(r"<small>rank 2–3</small>", text)  # idlg and rlg were drawn alike
    pairs = json.loads(
        re.search(r'data-pairs="passive_labels-labels-untrained-quick-[^"]+">(.*?)</script>', text, re.S)[1]
    )
    assert len(pairs) == 10  # the one that failed is not ranked
    assert any("llg minus idlg" in value and "can be told apart" in value for value in pairs.values())


def test_the_same_rows_give_the_same_files(results, site, tmp_path):
    again = build([results], tmp_path / "again", OPTIONS).index.parent
    assert digest(again) == digest(site)


def test_a_smaller_site_replaces_a_larger_one_and_nothing_else_is_overwritten(tmp_path):
    rows = site_rows()
    large, small = write_rows(tmp_path / "a.parquet", rows), write_rows(tmp_path / "b.parquet", rows[:12])
    build([large], tmp_path / "site")
    build([small], tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site/attacks").iterdir()) == ["llg.html"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="no site"):
        build([small], tmp_path / "thesis")


def test_the_download_has_every_row(site, results):
    assert pq.read_table(site / "rows.parquet").equals(pq.read_table(results / "rows.parquet"))
    assert (site / "cite.bib").read_text().startswith("@misc{leakbench_")


def test_the_index_is_light(site):
    assert sum((site / name).stat().st_size for name in ("index.html", "site.css", "site.js")) < 500_000


def test_a_reproduction_is_shown_and_a_damaged_one_left_out(tmp_path, results, site):
    assert "agrees" in (site / "reproductions.html").read_text()
    write_rows(tmp_path / "in/rows.parquet", site_rows()[:12])
    (tmp_path / "in/reproduction.json").write_text('{"not": "a list"')
    made = build([tmp_path / "in"], tmp_path / "out").index.parent
    assert "No paper was reproduced" in (made / "reproductions.html").read_text()


def test_files_that_hold_no_rows_are_refused_in_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="leave it out"):
        build([tmp_path / "x.parquet"], tmp_path / "site")
    with pytest.raises(UserError, match="no results at"):
        build([tmp_path / "missing"], tmp_path / "site")


def test_the_history_has_rules_and_boards_only(tmp_path):
    log = tmp_path / "C.md"
    log.write_text("# x\n## 0.2\n- [Rules] a `b`\n- [Code] c\n- [Board] d\n## 0.1\n- [Docs] e\n")
    assert history(log) == [("0.2", [("Rules", "a b"), ("Board", "d")])]


def test_a_code_link_is_https_or_absent(tmp_path):
    few = write_rows(tmp_path / "x.parquet", site_rows()[:12])
    made = build([few], tmp_path / "a", Options("javascript:alert(1)")).index.parent
    assert "javascript:" not in (made / "attacks/llg.html").read_text()
    made = build([few], tmp_path / "b", Options("https://example.org/code")).index.parent
    assert 'href="https://example.org/code/blob/' in (made / "attacks/llg.html").read_text()


def test_the_command_says_where_the_site_is_and_loads_no_torch(leakbench, results, tmp_path):
    code, out, _ = leakbench("site", results, "--out", tmp_path / "made")
    assert code == 0
    assert f"open {tmp_path / 'made' / 'index.html'}" in out


def test_layers_stand_in_their_order_with_a_chart_that_says_what_it_shows():
    from measure_rows import frame, measured

    from leakbench.board.measures import tables

    values = {"fc.weight": [0.7, 0.9], "conv.weight": [0.3, 0.1]}
    data = SimpleNamespace(measures=tables(frame(measured("sensitivity_share", values))))
    (page,) = localization.pages(data)
    (table,) = page.context["tables"]
    assert [line.values[0].text for line in table.lines] == ["fc.weight", "conv.weight"]
    assert table.lines[0].values[2].text == "0.800"
    assert "fc.weight 0.8, conv.weight 0.2" in table.charts[0].svg


def test_privacy_stands_against_the_accuracy_it_costs():
    common = dict.fromkeys([*TABLE_KEYS, *curves.SETTING_COLUMNS, *curves.CURVE_KEYS], "x") | {
        "role": "defense",
        "tasks": 2,
    }
    numbers = {"privacy_low": 0.4, "privacy_high": 0.6, "drop_low": 0.5, "drop_high": 1.5, "worst_task_privacy": 0.3}
    own = {"defense": "topk", "curve": "topk", "defense_label": "topk(p=0.9)", "unranked_because": None}
    lines = [common | numbers | own | {"privacy": p, "drop": d} for p, d in ((0.5, 1.0), (0.9, 7.0), (np.nan, 1.0))]
    (table,) = defenses.against_cost(pd.DataFrame(lines))
    assert [line.values[1].text for line in table.lines] == ["0.50", "0.90"]
    assert "topk: topk(p=0.9) 0.5, topk(p=0.9) 0.9" in table.charts[0].svg
    assert list(defenses.against_cost(pd.DataFrame(lines[2:]))) == []


def test_rows_are_the_same_in_one_file_and_in_several(tmp_path):
    rows, order = site_rows(), ["task_hash", "target", "attack", "defense", "trial"]
    files = [write_rows(tmp_path / f"{i}.parquet", part) for i, part in enumerate((rows, rows[100:], rows[:100]))]
    whole, split = (load(own).astype(object).sort_values(order, ignore_index=True) for own in (files[:1], files[1:]))
    pd.testing.assert_frame_equal(whole, split)
    assert len(whole) == len(rows)


def test_every_number_of_a_layer_leads_to_its_values_and_the_job_that_gave_them(site):
    text = (site / "localization.html").read_text()
    link = re.search(r'href="(measured/[^"#]+)#q-sensitivity_share">0.800<', text)
    values = (site / link[1]).read_text()
    assert f"leakbench reproduce {'ab12' * 4}" in values
    assert "leakbench measure localization --measure sensitivity<" in values
    assert [f'data-v="{value}"' in values for value in (0.7, 0.9, 0.3, 0.1)] == [True] * 4
    assert f"{'ab12' * 4}:1<" in values
    (fitted,) = set(re.findall(r'href="(measured/[^"#]+)#q-v_information"', text))
    numbers = re.findall(r'data-v="([^"]+)"', (site / fitted).read_text().partition("q-v_information")[2])
    assert {"0.25", "-0.25", "0.75", "40.0"} <= set(numbers)
    rows = pq.read_table(site / "measures.parquet").to_pandas()
    assert rows["value"].tolist() == [1.0, 1.0, 0.3, 0.1, 0.7, 0.9, 0.5, 0.25]
    assert 'href="measures.parquet"' in (site / "download.html").read_text()


def test_figures_of_papers_lead_to_rows_and_claims_to_measured_values(site):
    text = (site / "reproductions.html").read_text()
    rows = re.search(r'href="(cells/[^"]+)">0.88<', text)
    assert "<code>leakbench run quick --attack llg --defense topk" in (site / rows[1]).read_text()
    assert re.search(r'href="measured/[^"]+#q-sensitivity_share">0.7<', text)
    assert re.search(r'href="reproductions.html#(comparisons-[^"]+)">1<', text)[1] in text


def test_a_comparison_leads_to_the_two_things_that_it_compares():
    from measure_rows import frame, measured

    from leakbench.board.measures import tables
    from leakbench.tasks import BatchSpec

    four = INPUTS.model_copy(update={"batch": BatchSpec(size=4)})
    parts = [measured("sensitivity_share", {"all": [0.5, 0.5]}, task=task) for task in (INPUTS, four)]
    withheld = {"defense": "topk", "defense_label": "topk(p=0.9)"}
    parts.append(measured("sensitivity_share", {"all": [0.5, 0.5]}, **withheld))
    data = SimpleNamespace(measures=tables(frame(*parts)))
    both = [
        reproductions.compared(f"{INPUTS.id}: {sides}", "sensitivity_share", data)
        for sides in ("batch_size 1 against 4", "none against topk(p=0.9)")
    ]
    (one, larger), (bare, defended) = both
    assert one == bare
    assert len({one, larger, defended}) == 3
    assert reproductions.compared(INPUTS.id, "sensitivity_share", data) == (one, one)


def test_the_gallery_shows_original_recovered_and_floor(site):
    (page,) = (site / "gallery").glob("*.html")
    figures = re.findall(r"<figure>(.*?)</figure>", page.read_text(), re.S)
    sides = [re.findall(r'src="([^"]+)"[^>]* alt="(\w+),', figure) for figure in figures]
    assert [[words for _, words in own] for own in sides] == [
        *[["original", "recovered", "floor"]] * 3,
        *[["original", "recovered"]] * 3,  # of mean_image itself
    ]
    floors = {own[2][0] for own in sides[:3]} | {own[1][0] for own in sides[3:]}
    assert len(floors) == 1
    with Image.open(page.parent / floors.pop()) as picture:
        assert picture.getcolors() == [(64 * 64, 128)]
    assert re.search(r'<h3 id="d0-1"><a href="../cells/[^"]+">dlg</a>', page.read_text())


def test_a_floor_that_differs_from_victim_to_victim_is_not_shown():
    entry = {"attack": "mean_image", "defense": "none"}
    png = gallery_rules.strip(np.full((1, 1, 8, 8), 5, np.uint8))
    other = gallery_rules.strip(np.full((1, 1, 8, 8), 6, np.uint8))
    assert gallery._floor([[entry | {"recovered": png}, entry | {"recovered": other}]]) is None
    assert gallery._floor([[entry | {"recovered": png, "attack": "dlg"}]]) is None
    assert gallery._floor([[entry | {"recovered": png}] * 2])[1] == (64, 64)


def line_of(attack, task, value, **changes):
    common = {
        "defense": "none",
        "defense_label": "none",
        "n": 9,
        "season": "s",
        "season_commitment": "c",
        "benchmark_version": "1",
        "covered": 1,
        "target": "labels",
    }
    common |= {"lane": "passive_labels", "stage": "untrained", "dataset": "mnist", "reference": 0.2, "gain": np.nan}
    own = {"attack": attack, "attack_label": attack, "attack_version": 1, "attack_source_sha256": "a"}
    return common | own | {"task_hash": task, "advantage": value, "demonstration": False} | changes


def test_profiles_count_tasks_near_the_best_and_a_task_not_tried_as_chance():
    scores = {"a": (0.9, 0.5, 0.1, 0.4), "b": (0.8, 0.5, 0.6, None)}
    lines = [line_of(name, f"t{i}", v) for name, own in scores.items() for i, v in enumerate(own) if v is not None]
    lines += [line_of("b", "t4", 0.9, defense="topk"), line_of("a", "t4", 0.9, stage="converged")]
    lines += [line_of("c", "t0", 1.0)]  # of another suite
    board = pd.DataFrame(lines)
    nothing = np.zeros((0, 0))
    found = LaneTable([lines[0], lines[4]], nothing, nothing, frozenset({"t0", "t1", "t2", "t3"}))
    table = profiles.edges(board, found).droplevel([1, 2], axis=1)
    assert list(table) == ["a", "b"]
    assert table["a"].tolist() == [0.9, 0.5, 0.1, 0.4]
    assert table["b"].tolist() == [0.8, 0.5, 0.6, 0.0]
    chart = profiles.profile("x", board, found, "in edge")
    assert "over 4 tasks" in chart.caption
    # Gaps of a: 0, 0, .5, 0; of b: .1, 0, 0, .4. Marks are at quarters of the widest, .5.
    assert "a: within 0 0.75, within 0.125 0.75, within 0.25 0.75, within 0.375 0.75, within 0.5 1." in chart.svg
    assert "b: within 0 0.5, within 0.125 0.75, within 0.25 0.75, within 0.375 0.75, within 0.5 1." in chart.svg
    assert profiles.profile("x", board, replace(found, tasks=frozenset({"t0", "t1"})), "in edge") is None


def test_the_heat_map_compares_a_defense_on_tasks_that_were_attacked_undefended():
    lines = [line_of("a", "t0", 0.8), line_of("a", "t1", -7.0), line_of("b", "t0", 0.9, defense="topk")]
    lines += [line_of("a", task, v, defense="topk") for task, v in (("t0", 0.2), ("t2", 0.9))]
    lines += [line_of("a", "t0", 0.5, stage="converged"), line_of("a", "t3", 0.0)]
    board = pd.DataFrame([line | {"defense_label": line["defense"]} for line in lines])
    (table,) = heatmap._tables(board, {"quick": frozenset({"t0", "t1", "t2"}), "other": frozenset({"t3"})})
    shown = {line.values[0].text: [(v.text, v.extra) for v in line.values[1:]] for line in table.lines}
    assert shown == {
        "a": [("-0.10", "(2 tasks)"), ("0.20", "undefended 0.80 (1 task)")],  # at least -1, as on boards
        "b": [("–", ""), ("0.90", "undefended – (1 task)")],
    }
    places = {line.values[0].text: [v.style for v in line.values[1:]] for line in table.lines}
    assert places == {"a": ["h0", "h1"], "b": ["", "h5"]}  # of one task: half as dark


def test_references_become_bibtex_with_the_fields_they_hold_and_no_others():
    text = citing.bibtex_of(
        "attack",
        "x.y",
        'after Geng et al., "A & B", S&P 2024 (github.com/a_b), after Wainakh et al., PoPETs 2022, arXiv 2105.09369; '
        'as a defense Zhu, De Cristofaro, "C_1", NeurIPS 2019, arXiv 1906.08935, doi 10.1000/x.1; \n words: '
        'Lee, "D", arXiv 2601.00001',
    )
    assert (
        text
        == r"""@misc{attack_x_y,
  author        = {Geng and others},
  title         = {{A \& B}},
  year          = {2024},
  howpublished  = {S\&P},
}

@misc{attack_x_y_2,
  author        = {Zhu and {De Cristofaro}},
  title         = {{C\_1}},
  year          = {2019},
  howpublished  = {NeurIPS},
  eprint        = {1906.08935},
  archiveprefix = {arXiv},
  doi           = {10.1000/x.1},
}

@misc{attack_x_y_3,
  author        = {Lee},
  title         = {{D}},
  eprint        = {2601.00001},
  archiveprefix = {arXiv},
}
"""
    )
    assert citing.bibtex_of("attack", "x", "none; a library") == citing.bibtex_of("attack", "x", "") == ""
    assert (
        citing.bibtex_of("attack", "x", "folklore } since 1990")
        == "@misc{attack_x,\n  note          = {folklore  since 1990},\n}\n"
    )


def test_the_works_of_entries_with_rows_can_be_cited(site):
    cited = (site / "cite.bib").read_text()
    assert "@misc{attack_llg,\n  author        = {Wainakh and " in cited
    assert "@misc{attack_rtf" not in cited  # has no rows
    assert "@misc{attack_llg," in (site / "attacks/llg.html").read_text()


def test_every_cell_has_its_badge_and_what_it_means(site):
    badges = [re.search(r"<p>Badge <b>(.+?)</b>: (.+?)</p>", path.read_text()) for path in site.glob("cells/*/*.html")]
    assert badges
    assert {match[1] for match in badges} == {"claimed"}  # no seal
    assert all(match[2].startswith("no seal that the project signed") for match in badges)
    assert "claimed" in (site / "index.html").read_text()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("lane", "my_lane"),
        ("target", "souls"),
        ("stage", "weird"),
        ("attack_params", "not json"),
        ("defense_params", "[1, 2]"),
        ("instance_recall", float("inf")),
    ],
)
def test_rows_that_no_page_can_show_are_refused_with_file_job_and_column(tmp_path, column, value):
    rows = site_rows()[:3]
    rows[1] |= {column: value, "job_id": "feed"}
    path = write_rows(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: job feed: {column}: expected [^\n]+; leave"):
        build([path], tmp_path / "site")


def test_a_cell_prints_what_was_typed_for_its_run_and_where_its_rows_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row | {"job_id": "ab" * 8, "season": "development"} for row in site_rows()[:12]]
    for folder in (Path("elsewhere"), Path("runs/here")):
        write_job(folder, "ab" * 8, "development", rows)
        (folder / "plan.json").write_text(json.dumps({"command": "leakbench reproduce llg --quick --trials 12; rm x"}))
        site = build([folder], tmp_path / f"site-{folder.name}").index.parent
        (cell,) = site.glob("cells/*/*.html")
        example, typed = re.findall(r"<code>(leakbench .*?)</code></pre>", cell.read_text())
        where = " --rows elsewhere" if folder == Path("elsewhere") else ""
        assert example == f"leakbench reproduce {'ab' * 8}:{rows[0]['trial']}{where}"
        assert typed == "leakbench reproduce llg --quick --trials &#39;12;&#39; rm x"  # words, no second command


def test_figures_that_are_not_at_hand_are_one_sentence(tmp_path):
    folder = tmp_path / "breaking_sa"
    write_rows(folder / "rows.parquet", site_rows()[:12])
    line = {"setting": "s", "attack": "llg", "metric": "irec", "reference": None, "ours": 0.5}
    for count, words in ((1, "1 figure of"), (322, "322 figures of")):
        lines = [line | {"verdict": "figure not at hand"}] * count
        (folder / "reproduction.json").write_text(json.dumps(lines))
        text = (build([folder], tmp_path / "site").index.parent / "reproductions.html").read_text()
        assert f"<p>breaking_sa: {words} the paper not at hand;" in text
        assert "<table" not in text
    (folder / "reproduction.json").write_text(json.dumps([*lines, line | {"verdict": "agrees"}]))
    text = (build([folder], tmp_path / "site").index.parent / "reproductions.html").read_text()
    assert text.count("<tr data-key=") == 1


def test_a_line_of_a_lane_says_where_its_means_are_of_fewer_tasks_than_its_edge(tmp_path):
    rows = [row for row in site_rows() if row["attack"] != "idlg" or row["batch_size"] == 1]
    made = build([write_rows(tmp_path / "x.parquet", rows)], tmp_path / "site").index.parent
    text = (made / "boards/labels.html").read_text()
    lines = re.findall(r"<tr data-key.*?</tr>", text.partition('id="tasks"')[0], re.S)
    of = {re.search(r">([^<]+)</a>", line)[1]: "of its 1 task<" in line for line in lines}
    assert {name: told for name, told in of.items() if told} == {"idlg": True}
    assert of["llg"] is False


def test_a_row_has_its_value_where_it_is_shown_rounded(tmp_path):
    rows = [
        row | {"instance_recall": value} for row, value in zip(site_rows(), (0.123456789, 0.25, None), strict=False)
    ]
    (cell,) = build([write_rows(tmp_path / "x.parquet", rows)], tmp_path / "site").index.parent.glob("cells/*/*.html")
    places = [re.findall(r"<td.*?</td>", line)[2] for line in re.findall(r"<tr id=.*", cell.read_text())]
    assert sorted(places) == ['<td data-v="0.123456789">0.1235</td>', "<td>0.25</td>", "<td>–</td>"]


def test_what_was_said_of_an_entry_stands_on_its_cells_with_a_link(site):
    shown = [path.read_text() for path in site.glob("cells/*/*.html")]
    said = [text for text in shown if "Attack dlg confirmed by its author &lt;b&gt;" in text]
    assert said
    assert all('href="https://example.org/said" rel="noopener noreferrer nofollow"' in text for text in said)
    assert len(said) == sum("<title>dlg" in text for text in shown) < len(shown)
