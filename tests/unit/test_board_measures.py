"""Tables, correlations and pictures of measures, from frames whose numbers are known by hand."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import board_rows
import numpy as np
import pandas as pd
import pytest
from measure_rows import failed, frame, measured
from PIL import Image
from rich.console import Console
from scipy.stats import rankdata, spearmanr

from leakbench.board import measure_text, profile
from leakbench.board.correlations import UPDATE_KEYS, _resampled, correlations, rank_correlations
from leakbench.board.measures import KINDS, intervals, missing, pattern, tables, variants
from leakbench.board.stats import RESAMPLES, bootstrap, resamples, widening
from leakbench.errors import UserError
from leakbench.measures.catalogue import ALL, MEASURES
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.results import MEASURES_FOLDER, write_job
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

INPUTS = board_rows.INPUTS
LABELS = board_rows.LABELS
DEEP = [f"body.{i}.conv{j}" for i in range(10) for j in (1, 2)]


def of(task, **changes):
    return Task.model_validate(task.model_dump() | changes)


def shares(size=4, **changes):
    return measured("sensitivity_share", {"a": [0.25, 0.75] * size, "b": [0.75, 0.25] * size}, **changes)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_means_over_trials_have_the_bootstrap_interval_and_fitted_values_their_own():
    norms = {ALL: [1.0, 2.0, 6.0], "b": [2.0, 4.0, 12.0], "a": [0.0, 0.0, 3.0]}
    found = tables(frame(measured("gradient_norm", norms), measured("v_information", {"b": 0.25}, fitted=True)))
    proxy, bound = found["proxy"], found["lower_bound"]
    assert proxy["layer"].tolist() == [ALL, "b", "a"]
    assert proxy["value"].tolist() == [3.0, 6.0, 1.0]
    assert proxy["n"].tolist() == [3, 3, 3]
    # With three trials, in 1/27 of resamples all are the least: the percentiles are the extremes.
    wider = widening(3)
    assert proxy["low"].tolist() == pytest.approx([3 - wider * 2, 6 - wider * 4, 1 - wider * 1])
    assert proxy["high"].tolist() == pytest.approx([3 + wider * 3, 6 + wider * 6, 1 + wider * 2])
    line = board_rows.only(bound)
    assert (line["value"], line["low"], line["high"], line["n"], line["fitted"]) == (0.25, -0.25, 0.75, 40, True)


def test_resamples_that_quantities_share_are_those_of_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=(17, 3))
    drawn = np.concatenate(list(resamples(17)))
    assert drawn.shape == (RESAMPLES, 17)
    assert (drawn.sum(1) == 17).all()
    for column, low, high in zip(values.T, *intervals(values), strict=True):
        np.testing.assert_allclose((low, high), bootstrap(column, range(17))[1:], rtol=1e-9)


def test_the_order_of_rows_does_not_matter():
    rows = frame(
        shares(),
        shares(task=of(INPUTS, stage="early")),
        measured("v_information", {ALL: 0.5, "a": 0.1}, fitted=True),
        failed("i2f", "not_applicable", "no defense"),
    )
    attacks = pd.concat(
        [board_rows.frame(board_rows.make(list(range(8)), "ig", task=INPUTS, checkpoint_sha256="w", model_draws="one"))]
    )
    mixed, turned = rows.sample(frac=1, random_state=1), attacks.sample(frac=1, random_state=2)
    for kind, table in tables(rows).items():
        pd.testing.assert_frame_equal(tables(mixed)[kind], table)
    pd.testing.assert_frame_equal(missing(mixed), missing(rows))
    pd.testing.assert_frame_equal(correlations(turned, mixed), correlations(attacks, rows))


def test_kinds_never_share_a_table():
    every = [
        measured(quantity.name, {ALL: 0.5}, fitted=True)
        for name in MEASURES.names()
        for quantity in MEASURES.get(name).quantities
    ]
    found = tables(frame(*every))
    kinds = {q.name: q.kind for name in MEASURES.names() for q in MEASURES.get(name).quantities}
    for kind in KINDS:
        assert set(found[kind]["quantity"]) == {name for name, own in kinds.items() if own == kind}
    for sheet in measure_text.sheets(found):
        assert kinds[re.split(r"\s", sheet.title)[0]] == sheet.table
    with pytest.raises(
        UserError, match="expected one table, got lower_bound, proxy, proved_bound; choose with --table"
    ):
        measure_text.to_csv(found)


def test_stages_batch_sizes_defenses_and_trainings_are_lines_of_their_own():
    local = {"checkpoint_origin": "local"}
    rows = frame(
        shares(),
        shares(task=of(INPUTS, batch=BatchSpec(size=64))),
        shares(task=of(INPUTS, stage="early"), defense="topk", defense_label="topk", **local),
        shares(task=of(INPUTS, stage="early"), **local, checkpoint_sha256="v1"),
        shares(task=of(INPUTS, stage="early"), **local, checkpoint_sha256="v2"),
        shares(task=of(INPUTS, threat_model=ThreatModel(labels=True))),
    )
    table = tables(rows)["proxy"]
    table = table.assign(v=variants(table))
    assert (table.groupby(["v", "layer"]).size() == 1).all()
    names = sorted(table["v"].unique())
    assert [name for name in names if re.fullmatch(r"untrained-b1 [0-9a-f]{18}", name)] == names[-3:-1]
    assert names[-1] == "untrained-b64"
    assert [name.split(" ")[0] for name in names[:3]] == ["early-b1"] * 3
    assert sum(name.startswith("early-b1 vs topk") for name in names) == 1
    assert {name for name in names if "local:v" in name} == {"early-b1 local:v1", "early-b1 local:v2"}
    assert pattern(table) == "mnist-mlp-*-iid-gradient-inputs"


def test_what_was_not_measured_is_told_with_its_reason_unless_another_job_has_it():
    block = {"block_start": 0, "block_stop": 16}
    rows = frame(
        failed("v_information", "not_applicable", "too few", **block),
        measured("v_information", {ALL: 0.3}, fitted=True),
        failed("spectrum", "oom", "out of memory", **block),
        failed("spectrum", "oom", "out of memory", block_start=16, block_stop=20),
        measured("gradient_norm", {ALL: [1.0] * 8}, block_start=0, block_stop=8),
        failed("sensitivity", "timeout", "slow", **block),
    )
    table = missing(rows)
    told = table[["measure", "status", "jobs", "trials", "error"]].to_numpy().tolist()
    assert told == [["sensitivity", "timeout", 1, 8, "slow"], ["spectrum", "oom", 2, 20, "out of memory"]]
    assert "oom" in measure_text.markdown({"missing": table})


# --- correlations -----------------------------------------------------------------------------------------------------


def attack(values, task=INPUTS, metric="psnr", **changes):
    rows = board_rows.make(values, changes.pop("attack", "ig"), task=task, model_draws="one", checkpoint_sha256="w")
    for row, value in zip(rows, values, strict=True):
        row |= {metric: value} | changes
    return rows


def test_a_proxy_passes_where_more_of_it_goes_with_better_attacks_only():
    trials = list(range(12))
    falling = [float(12 - t) for t in trials]
    attacks = attack([10.0 + t**2 for t in trials])
    for row, t in zip(attacks, trials, strict=True):
        row |= {"mse": 1.0 / (1 + t), "psnr_floor": 2.0 * t**2}
    rising = measured("gradient_norm", {ALL: [float(t) for t in trials], "a": falling})
    neutral = measured("sensitivity_share", {"a": falling})
    table = correlations(board_rows.frame(attacks), frame(rising, neutral)).set_index(["quantity", "layer", "metric"])
    assert set(table.index) == {
        (*own, metric)
        for own in (("gradient_norm", ALL), ("gradient_norm", "a"), ("sensitivity_share", "a"))
        for metric in ("psnr", "psnr_gain", "mse")
    }
    best = table.loc[("gradient_norm", ALL, "psnr")]
    assert (best["spearman"], best["low"], best["high"], best["n"], best["expected"], best["passes"]) == (
        1,
        1,
        1,
        12,
        1,
        True,
    )
    error = table.loc[("gradient_norm", ALL, "mse")]  # less error is a better attack
    assert (error["spearman"], error["expected"], error["passes"]) == (-1, -1, True)
    dark = table.loc[("gradient_norm", ALL, "psnr_gain")]  # the better, the less above what needs no update
    assert (dark["spearman"], dark["expected"], dark["passes"]) == (-1, 1, False)
    wrong = table.loc[("gradient_norm", "a", "psnr")]
    assert (wrong["spearman"], wrong["expected"], wrong["passes"]) == (-1, 1, False)
    claims_nothing = table.loc[("sensitivity_share", "a", "psnr")]
    assert pd.isna(claims_nothing["expected"])
    assert claims_nothing["passes"] is None
    assert (table["measured_on"] == INPUTS.id).all()
    printed = measure_text.markdown({"correlations": table.reset_index()})
    assert "1.00 [1.00, 1.00] ✓" in printed
    assert "sensitivity_share" not in printed
    whole = correlations(board_rows.frame(attacks), frame(rising, neutral), layers=False)
    assert set(whole["layer"]) == {ALL}


def test_rank_correlations_and_their_resamples_are_scipys():
    rng = np.random.default_rng(3)
    quality = rng.integers(0, 6, size=20).astype(float)  # with ties
    values = np.stack([quality + rng.normal(size=20), rng.integers(0, 3, size=20).astype(float), np.ones(20)], 1)
    (first, second, constant) = rank_correlations(values, quality)
    drawn = np.concatenate(list(resamples(20))).astype(int)
    for column, found in ((0, first), (1, second)):
        assert found[0] == pytest.approx(spearmanr(values[:, column], quality).statistic)
        rhos = []
        for counts in drawn[:400]:
            rows = np.repeat(np.arange(20), counts)
            rhos.append(np.corrcoef(rankdata(values[rows, column]), rankdata(quality[rows]))[0, 1])
        own = _resampled(values[:, [column]], quality, drawn[:400].astype(float))[:, 0]
        np.testing.assert_allclose(own, rhos, atol=1e-12)
        assert found[1] < found[0] < found[2]
    assert np.isnan(constant).all()


def test_an_interval_of_independent_numbers_holds_zero_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(100):
        ((_, low, high),) = rank_correlations(rng.normal(size=(30, 1)), rng.normal(size=30))
        misses += not low <= 0 <= high
    assert 1 <= misses <= 15  # 5 expected, the percentile interval a little narrow


def test_with_few_trials_there_is_no_interval_and_nothing_passes():
    table = correlations(
        board_rows.frame(attack([1.0, 2.0, 3.0])), frame(measured("gradient_norm", {ALL: [1.0, 2.0, 3.0]}))
    )
    line = board_rows.only(table[table["metric"] == "psnr"])
    assert line["spearman"] == 1
    assert np.isnan(line["low"])
    assert line["passes"] is None


def test_trials_are_joined_by_trial_draw_and_weights_and_failed_or_planted_ones_left_out():
    norms = measured("gradient_norm", {ALL: [float(t) for t in range(20)]})
    attacks = attack([float(t) for t in range(20)])
    attacks[3] |= {"status": "timeout", "psnr": None}
    attacks[4]["planted_share"] = 0.1
    attacks[5]["checkpoint_sha256"] = "other"
    attacks[6]["draw"] = 1
    assert correlations(board_rows.frame(attacks), frame(norms))["n"].tolist() == [16, 16]
    assert correlations(board_rows.frame(attack([1.0] * 8, defense="topk")), frame(norms)).empty


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"target": "labels"}, True),
        ({"threat_model": ThreatModel(labels=True, auxiliary=10)}, True),
        ({"batch": BatchSpec(size=2)}, False),
        ({"batch": BatchSpec(sampler="unique")}, False),
        ({"protocol": Protocol(sends="delta", lr=0.2)}, False),
        ({"protocol": Protocol(precision="float64")}, False),
        ({"normalise": False}, False),
        ({"architecture": Architecture(name="mlp", params={"width": 3})}, False),
        ({"target": "membership"}, False),
        ({"target": "attribute", "attribute": {"name": "class"}}, False),
    ],
)
def test_tasks_share_measures_exactly_where_they_share_victims_and_clients(changes, same):
    other = of(INPUTS, **{k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in changes.items()})
    assert other.hash != INPUTS.hash
    norms = frame(measured("gradient_norm", {ALL: [float(t) for t in range(8)]}, task=other))
    table = correlations(board_rows.frame(attack([float(t) for t in range(8)])), norms)
    assert table["metric"].tolist() == ["psnr", "psnr_gain"] * same
    if same:
        assert set(table["measured_on"]) == {other.id}
        # What was measured on the task itself goes first.
        own = frame(measured("gradient_norm", {ALL: [float(-t) for t in range(8)]}))
        assert correlations(board_rows.frame(attack([float(t) for t in range(8)])), pd.concat([norms, own]))[
            "spearman"
        ].tolist() == [-1, -1]


def test_victims_of_tasks_that_share_measures_are_the_same():
    from leakbench.data import draw_task, load_dataset

    data = load_dataset("digits")
    tasks = [of(LABELS, dataset="digits", target=target) for target in ("labels", "inputs", "membership")]
    drawn = [draw_task(data, task, trials=range(4), key=b"k").indices for task in tasks]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert set(Protocol.model_fields) <= set(UPDATE_KEYS)


# --- text -------------------------------------------------------------------------------------------------------------


def long_rows():
    stages = ("untrained", "early", "converged", "sgd(steps=100, lr=0.05)")
    layers = {ALL: [1.0, 2.0, 3.0], **{f"very.long.module.names.of.{name}": [1e-5, 2e-5, 4e-5] for name in DEEP}}
    tasks = [of(INPUTS, stage=stage, batch=BatchSpec(size=size)) for stage in stages for size in (1, 64)]
    return frame(*(measured("gradient_norm", layers, task=task) for task in tasks))


def test_twenty_layers_in_eight_settings_fit_the_terminal_whole_update_first():
    out = io.StringIO()
    rows = long_rows()
    attacks = board_rows.frame(attack([1.0, 2.0, 3.0]))
    measure_text.terminal(
        {**tables(rows), "correlations": correlations(attacks, rows), "missing": missing(rows)},
        Console(file=out, width=80),
    )
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= measure_text.WIDTH
    heads = [i for i, line in enumerate(lines) if line.startswith("layer ")]
    assert len(heads) > 1
    assert all(lines[i + 1].startswith("all ") for i in heads)
    assert sum(lines[i + 1].count("2.00 [-0.689, 4.69]") for i in heads) == 8
    columns = " ".join(lines[i] for i in heads)
    assert columns.split()[:2] == ["layer", "untrained-b1"]
    assert columns.index("converged-b1") < columns.index("sgd100-lr0.05-b1")


def test_json_and_csv_hold_every_column_and_markdown_every_number():
    rows = frame(shares(), measured("v_information", {ALL: 0.5, "a": 0.25}, fitted=True, ends=None))
    found = {**tables(rows), "missing": missing(rows)}
    read = json.loads(measure_text.to_json(found))
    assert [line["value"] for line in read["proxy"]] == [0.5, 0.5]
    assert [line["layer"] for line in read["lower_bound"]] == [ALL, "a"]
    assert read["lower_bound"][0]["low"] is None
    assert read["meta"]["quantities"]["v_information"]["kind"] == "lower_bound"
    table = pd.read_csv(io.StringIO(measure_text.to_csv({"proxy": found["proxy"]})))
    assert list(table.columns) == list(found["proxy"].columns)
    text = measure_text.markdown(found)
    assert "| a | 0.250 |" in text
    assert text.count("\n## ") + text.startswith("## ") == 2


# --- picture ----------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_same_file_each_time_with_text_and_description():
    rows = frame(
        shares(),
        shares(task=of(INPUTS, stage="early")),
        measured("v_information", {"a": 0.5, "b": 0.75}, fitted=True),
        measured(
            "latent_specificity", {"a": [1.0, 1.1], "b": [1.2, 1.3]}, task=of(INPUTS, architecture={"name": "lenet5"})
        ),
    )
    found = tables(rows)
    svg = profile.render(found, "svg").decode()
    assert profile.render(found, "svg").decode() == svg
    few = {kind: table[table["quantity"] == "v_information"] for kind, table in found.items()}
    assert profile.render(few, "png") == profile.render(few, "png")
    root = ET.fromstring(svg)  # a file of our own
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title").text == "Layer profile of leakage"
    assert "v_information is greatest in b, 0.75." in root.find(f"{space}desc").text
    texts = {"".join(element.itertext()).strip() for element in root.iter(f"{space}text")}
    words = {"a", "b", "mnist", "mlp", "lenet5", "untrained", "early", "*-b1-iid-gradient-inputs", "not measured"}
    assert words <= texts
    assert "lower bound" in svg


@pytest.mark.parametrize("layers", [4, 20])
def test_names_of_layers_do_not_overlap_and_nothing_is_cut_off(layers):
    names = DEEP[:layers]
    tasks = [
        of(INPUTS, stage=stage, batch=BatchSpec(size=size)) for stage in ("untrained", "converged") for size in (1, 64)
    ]
    parts = [measured("sensitivity_share", {name: [1 / layers] * 3 for name in names}, task=task) for task in tasks]
    parts += [measured("v_information", dict.fromkeys(names, 0.5), fitted=True, ends=0.1, task=task) for task in tasks]
    figure = profile.draw(tables(frame(*parts)))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = [own for own in figure.axes if own.get_xlabel()]
    boxes = [label.get_window_extent(renderer) for label in axes[0].get_xticklabels()]
    assert len(boxes) == layers
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
    legend = next(own.get_legend() for own in figure.axes if own.get_legend()).get_window_extent(renderer)
    assert legend.y1 <= min(box.y0 for box in boxes)
    whole = figure.get_tightbbox(renderer)  # inches
    width, height = figure.get_size_inches()
    assert whole.x0 >= -0.01
    assert whole.y0 >= -0.01
    assert whole.x1 <= width + 0.01
    assert whole.y1 <= height + 0.01


def test_lines_differ_in_marker_and_dashes_and_two_measures_of_a_quantity_in_name():
    twice = frame(shares(), shares(measure_params='{"probes": 8}', measure_label="sensitivity(probes=8)"))
    assert set(profile.chosen(tables(twice))["series"]) == {
        "untrained-b1 sensitivity v1",
        "untrained-b1 sensitivity(probes=8) v1",
    }
    figure = profile.draw(
        tables(frame(*(shares(task=of(INPUTS, batch=BatchSpec(size=size))) for size in range(1, 13))))
    )
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert len(lines) == profile.MOST_LINES
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines)
    legend = next(own.get_legend() for own in figure.axes if own.get_legend())
    assert "4 more are left out" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()][0::7] == ["b1", "b12"]


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    trials = list(range(8))
    attacks = attack([float(t) for t in trials], job_id="a", block_stop=8)
    write_job(tmp_path, "a", "2026", attacks)
    parts = {
        "m": measured("gradient_norm", {ALL: [float(t) for t in trials], "a": [1.0] * 8}),
        "s": shares(),
        "f": measured("v_information", {ALL: 0.5, "a": 0.25}, fitted=True),
        "n": failed("i2f", "not_applicable", "needs a defense"),
    }
    for job, rows in parts.items():
        write_job(tmp_path / MEASURES_FOLDER, job, "2026", [row | {"job_id": job} for row in rows], MEASURE_FIELDS)
    return tmp_path


def test_board_prints_measures_and_draws_their_profile(leakbench, out):
    code, text, error = leakbench("board", out, "--measures")
    assert (code, error) == (0, "")
    headings = [measure_text.HEADINGS[name] for name in ("lower_bound", "proxy", "correlations", "missing")]
    assert sorted(headings, key=text.index) == headings
    assert "1.00 [1.00, 1.00] ✓" in text
    assert "needs a defense" in text
    assert text.splitlines()[-1] == f"layer profile: {out / 'profile.svg'}"
    assert (out / "profile.svg").read_text().startswith("<?xml")
    code, text, _ = leakbench("board", out, "--measures", "--json", "--profile", out / "p.png")
    assert code == 0
    assert set(json.loads(text)) == {"meta", *measure_text.TABLES}
    assert Image.open(out / "p.png").size[0] > 300


def test_board_gives_one_table_as_csv_and_says_which_there_are(leakbench, out):
    code, text, _ = leakbench("board", out, "--measures", "--csv", "--table", "correlations")
    assert code == 0
    table = pd.read_csv(io.StringIO(text))
    found = dict(zip(table["quantity"] + " " + table["layer"], table["spearman"], strict=True))
    assert found["gradient_norm all"] == 1
    assert np.isnan(found["gradient_norm a"])
    assert not (out / "profile.svg").exists()
    code, _, error = leakbench("board", out, "--measures", "--csv")
    assert code == 2
    assert "choose with --table lower_bound" in error
    code, text, _ = leakbench("board", out, "--table", "proxy", "--markdown")
    assert code == 0
    assert text.startswith("## Proxies")
    assert "v_information" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "proxies"], "unknown table 'proxies'. Did you mean 'proxy'"),
        (["--measures", "--profile", "x.pdf"], "expected a .svg or .png file"),
        (["--measures", "--lanes"], "leave one out"),
        (["--measures", "--profile", "no/such/folder/x.svg"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(leakbench, out, arguments, said):
    code, _, error = leakbench("board", out, *arguments)
    assert code == 2
    assert said in error.splitlines()[-1]


def test_without_measures_or_without_attacks_or_without_layers(leakbench, out, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    code, _, error = leakbench("board", other, "--measures")
    assert code == 2
    assert "leakbench measure quick" in error
    rows = [row | {"job_id": "g"} for row in measured("gradient_norm", {ALL: [1.0, 2.0]})]
    write_job(other / MEASURES_FOLDER, "g", "2026", rows, MEASURE_FIELDS)
    code, text, error = leakbench("board", other, "--measures")
    assert code == 0
    assert "gradient_norm" in text
    assert error.startswith("no layer profile: ")
    assert not (other / "profile.svg").exists()


def test_an_attack_above_a_proved_bound_is_told_and_ends_the_board_with_1(leakbench, tmp_path):
    task = of(LABELS, target="membership", batch=BatchSpec(size=4))
    attacks = attack([1.0] * 40, task=task, metric="inference_accuracy", inference_truth=1, inference_score=1.0)
    noisy = {"defense": "gaussian_noise", "defense_label": "gaussian_noise"}
    write_job(tmp_path, "a", "2026", [row | noisy | {"job_id": "a"} for row in attacks])
    assert leakbench("board", tmp_path)[0] == 0
    bound = measured("membership_accuracy_bound", {ALL: [0.6] * 40}, task=task, job_id="b", **noisy)
    write_job(tmp_path / MEASURES_FOLDER, "b", "2026", bound, MEASURE_FIELDS)
    for form in ([], ["--measures"], ["--measures", "--json"]):
        code, text, error = leakbench("board", tmp_path, *form)
        assert code == 1
        assert text
        (line,) = [line for line in error.splitlines() if line.startswith("proved bound exceeded: ")]
        assert "inference_accuracy 1.000" in line
        assert "above membership_accuracy_bound 0.600" in line


def test_reading_measures_imports_no_torch_and_matplotlib_only_to_draw(out):
    probe = (
        "import sys\nfrom leakbench import cli\n"
        "for line in ([], ['--measures', '--json'], ['--measures']):\n"
        "    try:\n        cli.main(['board', sys.argv[1], *line])\n"
        "    except SystemExit:\n        print('after', *(n for n in ('torch', 'matplotlib') if n in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe, str(out)], capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.split()[:1] == ["after"]]
    assert found == ["after", "after", "after matplotlib"]
