"""The table of a paper's figures beside ours: matching, verdicts, and what the reference files may say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from leakbench import reproduce
from leakbench.errors import UserError
from leakbench.grids import Cell
from leakbench.reproduce import Figure, References, compare, load_references, reference_paths
from leakbench.schema import ROW_FIELDS
from leakbench.suites import load_suite

ROW = dict.fromkeys((field.name for field in ROW_FIELDS), None) | {
    "task_hash": "a",
    "task": "digits-mlp",
    "architecture": "mlp",
    "architecture_params": "{}",
    "stage": "untrained",
    "local_steps": 1,
    "sampler": "iid",
    "draw": 0,
    "dataset": "digits",
    "batch_size": 8,
    "attack": "llg",
    "attack_label": "llg",
    "defense": "none",
    "defense_label": "none",
    "target": "labels",
    "status": "ok",
}


def rows(values, **changed):
    return [
        {**ROW, **changed, "instance_recall": value, "instance_recall_chance": 0.2, "trial": t}
        for t, value in enumerate(values)
    ]


def references(*figures, common=None):
    return References(paper="p", provenance="q", quick=[], quick_trials=1, common=common or {}, figures=list(figures))


def figure(value, tries=50, **where):
    where = {"batch_size": 8, "attack": "llg", **where}
    return Figure(
        setting="s", where=where, values={"instance_recall": value}, tag="LOG", source="x", tries=tries, note="why"
    )


def table(*parts, refs, **options):
    return compare(pd.DataFrame([row for part in parts for row in part]), refs, **options).to_dict(orient="records")


def test_a_figure_agrees_within_the_sampling_error_of_both_means_and_its_rounding():
    values = [0.4, 0.6] * 18
    tolerance = 1.959964 * np.std(values, ddof=1) * np.sqrt(1 / 36 + 1 / 50) + 0.0005
    for distance, verdict in ((0.99, "agrees"), (1.01, "differs"), (-0.99, "agrees"), (-1.01, "differs")):
        (line,) = table(rows(values), refs=references(figure(0.5 - distance * tolerance)))
        assert line["verdict"] == verdict
        assert line["ours"] == pytest.approx(0.5)
        assert line["difference"] == pytest.approx(distance * tolerance)
        assert line["low"] < 0.5 < line["high"]
        assert line["note"] == ("why" if verdict == "differs" else "")


def test_the_spread_between_models_counts_where_several_trials_share_one():
    means, within = np.array([0.3, 0.5, 0.7]), np.array([-0.01, 0.01] * 10)
    values = (means[:, None] + within).ravel()
    parts = [row | {"draw": i // 20} for i, row in enumerate(rows(list(values)))]
    inner = (within**2).sum() * 3 / (60 - 3)
    between = 0.04 - inner / 20
    tolerance = 1.959964 * np.sqrt(between * (1 / 3 + 1) + inner * (1 / 60 + 1 / 50)) + 0.0005
    assert table(parts, refs=references(figure(0.5)))[0]["tolerance"] == pytest.approx(tolerance)


def test_figures_of_one_setting_stand_together():
    refs = references(
        figure(0.5), figure(0.4, batch_size=9).model_copy(update={"setting": "t"}), figure(0.3, attack="x")
    )
    assert [line["setting"] for line in table(rows([0.5, 0.6]), refs=refs)] == ["s", "s", "t"]


def test_figures_without_spread_agree_only_up_to_their_rounding():
    assert table(rows([1.0] * 9), refs=references(figure(1.0)))[0]["verdict"] == "agrees"
    assert table(rows([1.0] * 9), refs=references(figure(0.999)))[0]["verdict"] == "differs"


def test_every_cell_and_every_figure_has_a_line():
    other = rows([0.1, 0.2], task_hash="b", task="digits-lenet", batch_size=32)
    lines = table(rows([0.5, 0.7]), other, refs=references(figure(0.6), figure(0.3, batch_size=99)))
    assert [line["verdict"] for line in lines] == ["agrees", "not measured", "figure not at hand"]
    assert pd.isna(lines[2]["reference"])
    lines = table(rows([0.5, 0.7]), refs=references(figure(0.3, batch_size=99)), whole=False)
    assert [line["verdict"] for line in lines] == ["figure not at hand"]


def test_what_failed_or_is_not_at_hand_is_not_measured_and_says_why():
    part = rows([None, None], status="unavailable", error="no svhn here")
    (line,) = table(part, refs=references(figure(0.3)))
    assert line["verdict"] == "not measured"
    assert line["note"] == "unavailable: no svhn here"
    mixed = [*rows([0.5] * 3), *rows([None], status="timeout", error="slow")]
    assert table(mixed, refs=references(figure(0.5)))[0]["note"] == "timeout: slow"


def test_common_conditions_hold_for_all_figures():
    defended = rows([0.1] * 3, defense="topk", defense_label="topk(p=0.9)")
    lines = table(rows([0.9] * 3), defended, refs=references(figure(0.9), common={"defense": "none"}))
    assert [(line["defense"], line["verdict"]) for line in lines] == [
        ("none", "agrees"),
        ("topk(p=0.9)", "figure not at hand"),
    ]


def test_the_table_is_written_in_three_forms(tmp_path):
    refs = references(figure(0.5), figure(0.1, batch_size=3))
    made = compare(pd.DataFrame(rows([0.4, 0.6])), refs)
    csv, js, md = reproduce.write_table(made, refs, tmp_path)
    assert len(pd.read_csv(csv)) == len(json.loads(js.read_text())) == 2
    assert json.loads(js.read_text())[1]["ours"] is None
    assert "| s | llg | none | instance_recall | 0.500 LOG |" in md.read_text()
    with pytest.raises(UserError, match="another --out"):
        reproduce.write_table(made, refs, tmp_path / "absent")


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference_paths())
def test_every_figure_is_of_exactly_one_cell_of_its_suite(name):
    refs = load_references(name)
    cells = load_suite(name).expand()
    described = [
        {**reproduce.task_columns(c.task), "attack": c.attack.name, "defense": "+".join(d.name for d in c.defense)}
        for c in cells
    ]
    for each in refs.figures:
        where = {**refs.common, **each.where}
        where["defense"] = "" if where.get("defense") == "none" else where.get("defense")
        found = [d for d in described if all(d.get(key) == value for key, value in where.items())]
        assert len(found) == 1, each.setting


@pytest.mark.parametrize("name", reference_paths())
def test_quick_keeps_some_cells_and_drops_some(name):
    refs = load_references(name)
    cells = load_suite(name).expand()
    kept = [cell for cell in cells if reproduce.is_quick(cell, refs)]
    assert all(isinstance(cell, Cell) for cell in kept)
    assert 0 < len(kept) < len(cells)


def test_a_mistake_in_a_reference_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "tasks_folder", lambda: tmp_path)
    (tmp_path / "references").mkdir()
    good = (
        "{paper: p, provenance: q, quick: [], quick_trials: 1, figures: [{setting: s, where: {batch_size: 3}, "
        "values: {irec: 1.0}, tag: LOG, source: x, tries: 1}]}"
    )
    for old, new, message in (
        ("batch_size: 3", "batchsize: 3", "batch_size"),
        ("irec", "irek", "irec"),
        ("LOG", "MEM", "tag"),
        ("{irec: 1.0}", "[1.0]", "values"),
        ("quick_trials: 1, ", "quick_trials: 0, ", "quick_trials"),
        ("quick: []", "quick: [], claims: [{name: c, source: s, quantities: [nothing], axis: batch_size}]", "nothing"),
    ):
        text = good.replace(old, new)
        (tmp_path / "references" / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            load_references("x")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown paper"):
        load_references("y")
