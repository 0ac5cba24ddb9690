"""Pictures: chosen by rule, shown only where they may be, whole files, and never at the price of rows."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from leakbench import gallery
from leakbench.board.sheet import contact_sheet
from leakbench.cli import cli
from leakbench.data import draw_victims, load_dataset
from leakbench.entries import resolve
from leakbench.errors import UserError
from leakbench.grids import Budget, Cell
from leakbench.keys import DEVELOPMENT, Season
from leakbench.metrics.images import PSNR_CAP
from leakbench.runner.execute import Runner
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Task, ThreatModel

TASK = Task(
    dataset="digits",
    architecture=Architecture(name="mlp"),
    batch=BatchSpec(size=3),
    threat_model=ThreatModel(auxiliary=10),
    target="inputs",
)
TRIALS = 5


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def entry(trial=0, rule="best", psnr=20.0, **changes):
    picture = gallery.strip(np.full((2, 1, 8, 8), 9, np.uint8))
    names = {key: 1 if key.endswith("_version") else key for key in gallery.IDENTITY}
    own = {"job_id": "ab", "trial": trial, "rule": rule, "psnr": psnr, "psnr_floor": 10.0, "images": 2}
    return names | own | {"true": picture, "recovered": picture, "visible_loss_trace": [3.0, 0.5]} | changes


def job(psnrs, trials, **changes):
    return [entry(trial=trials[i], rule=rule, psnr=psnrs[i], **changes) for rule, i in gallery.choose(psnrs).items()]


# --- what is shown ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12))
def test_trials_are_chosen_by_rule_and_ties_go_to_the_first(psnr):
    chosen = gallery.choose(psnr)
    assert list(chosen) == list(gallery.RULES)
    assert chosen["best"] == psnr.index(max(psnr))
    assert chosen["worst"] == psnr.index(min(psnr))
    median = psnr[chosen["median"]]
    below, above = sum(p < median for p in psnr), sum(p > median for p in psnr)
    assert below <= (len(psnr) - 1) // 2
    assert above <= len(psnr) // 2


def test_the_median_is_the_lower_one():
    assert gallery.choose([4.0, 1.0, 3.0, 2.0])["median"] == 3


@pytest.mark.parametrize(
    ("season", "dataset", "shown"),
    [
        (DEVELOPMENT, "digits", True),
        (DEVELOPMENT, "cifar10", True),
        (DEVELOPMENT, "imagenet", False),
        (DEVELOPMENT, "faces.npz", False),
        (Season("spring", b"a secret of some length"), "digits", False),
        (Season("development", b"a secret of some length"), "digits", False),
    ],
)
def test_only_victims_of_the_public_season_and_of_some_datasets_are_shown(season, dataset, shown):
    assert gallery.may_show(season, dataset) == shown


@pytest.mark.parametrize(("channels", "size", "factor"), [(1, 8, 8), (1, 28, 2), (3, 32, 2), (3, 100, 1)])
def test_pictures_repeat_pixels_and_show_the_first_images(channels, size, factor):
    images = np.random.default_rng(0).integers(0, 256, (10, channels, size, size), dtype=np.uint8)
    picture = pixels_of(gallery.strip(images))
    side = factor * size
    assert picture.shape[:2] == (side, 8 * side + 7 * 2)
    for number in range(8):
        left = number * (side + 2)
        shown = picture[::factor, left : left + side : factor].reshape(size, size, -1).transpose(2, 0, 1)
        assert np.array_equal(shown, images[number])


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_cell_of_several_jobs_shows_the_best_and_worst_of_all(tmp_path):
    gallery.write_gallery(tmp_path, "a", job([20.0, 30.0, 10.0], trials=[0, 1, 2]))
    gallery.write_gallery(tmp_path, "b", job([25.0, 30.0, 5.0], trials=[3, 4, 5]))
    gallery.write_gallery(tmp_path, "c", job([1.0], trials=[6], attack_label="other"))
    cell, other = gallery.read_gallery(tmp_path)
    assert [(e["rule"], e["trial"], e["psnr"]) for e in cell] == [("best", 1, 30), ("median", 0, 20), ("worst", 5, 5)]
    assert [(e["rule"], e["trial"]) for e in other] == [("best", 6), ("median", 6), ("worst", 6)]
    assert cell[0]["visible_loss_trace"] == [3.0, 0.5]


def test_cells_are_selected_by_attack_and_task_and_unknown_ones_are_named(tmp_path):
    gallery.write_gallery(tmp_path, "a", job([1.0], [0], attack="one", attack_label="one(x=1)", task="t1"))
    gallery.write_gallery(tmp_path, "b", job([1.0], [0], attack="two", attack_label="two", task="t2"))
    for choice in ({"attack": "one"}, {"attack": "one(x=1)"}, {"task": "t1"}):
        ((first, *_),) = gallery.read_gallery(tmp_path, **choice)
        assert first["attack"] == "one"
    with pytest.raises(UserError, match=r"unknown attack 'tow'\. Did you mean 'two'"):
        gallery.read_gallery(tmp_path, attack="tow")
    with pytest.raises(UserError, match="unknown task"):
        gallery.read_gallery(tmp_path, task="t3")


def test_undefended_cells_come_first_and_better_attacks_before_worse(tmp_path):
    for name, (psnr, defense) in {"a": (5.0, "none"), "b": (9.0, "none"), "c": (50.0, "topk")}.items():
        gallery.write_gallery(
            tmp_path, name, job([psnr], [0], attack_label=name, defense=defense, defense_label=defense)
        )
    assert [cell[0]["attack_label"] for cell in gallery.read_gallery(tmp_path)] == ["b", "a", "c"]


def test_a_damaged_file_is_left_out_and_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no pictures under"):
        gallery.read_gallery(tmp_path)
    gallery.write_gallery(tmp_path, "a", job([1.0], [0]))
    (tmp_path / "gallery" / "b.parquet").write_bytes(b"cut off")
    pd.DataFrame({"psnr": [1.0]}).to_parquet(tmp_path / "gallery" / "c.parquet")
    assert len(gallery.read_gallery(tmp_path)) == 1


def test_a_new_measurement_without_pictures_removes_the_old_ones(tmp_path):
    gallery.write_gallery(tmp_path, "a", job([1.0], [0]))
    gallery.write_gallery(tmp_path, "a", [])
    assert not list((tmp_path / "gallery").iterdir())


# --- the runner -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned():
    def make(attack, season=DEVELOPMENT, task=TASK):
        (spec,) = resolve("attack", attack)
        (only,) = plan([Cell("", task, spec, (), TRIALS, TRIALS, budget=Budget(wall_seconds=60.0))], season)
        return only

    return make


def run(out, planned_job):
    with Runner(out, season=planned_job.season, isolation="process") as runner:
        return runner.run(planned_job)


def test_the_pictures_of_a_job_show_the_victims_and_what_was_recovered_of_them(tmp_path, planned):
    outcome = run(tmp_path, planned("random_image"))
    rows = pd.read_parquet(outcome.path).set_index("trial")
    (cell,) = gallery.read_gallery(tmp_path)
    assert [e["rule"] for e in cell] == list(gallery.RULES)
    data = load_dataset("digits")
    for e in cell:
        assert (e["psnr"], e["psnr_floor"]) == tuple(rows.loc[e["trial"], ["psnr", "psnr_floor"]])
        assert e["job_id"] == rows["job_id"].iloc[0]
        victims = draw_victims(
            data, TASK.batch, clients=1, local_batches=1, trials=[e["trial"]], key=DEVELOPMENT.key
        ).inputs[0, 0]
        true, recovered = (pixels_of(e[k])[::8].astype(float) for k in ("true", "recovered"))
        images = [[strip[:, 66 * n : 66 * n + 64 : 8] for n in range(3)] for strip in (true, recovered)]
        assert np.array_equal(images[0], victims[:, 0])
        errors = [((a - b) ** 2).mean() / 255**2 for a, b in zip(*images, strict=True)]
        assert np.mean(-10 * np.log10(np.maximum(errors, 10 ** (-PSNR_CAP / 10)))) == pytest.approx(e["psnr"], abs=0.1)
    assert rows["psnr"].max() == cell[0]["psnr"]
    assert rows["psnr"].min() == cell[2]["psnr"]
    assert rows["psnr"].quantile(0.5, interpolation="lower") == cell[1]["psnr"]


def test_a_job_that_is_done_has_its_pictures(tmp_path, planned, monkeypatch):
    def killed(*_):
        assert list((tmp_path / "gallery").glob("*.parquet"))
        raise KeyboardInterrupt

    monkeypatch.setattr("leakbench.runner.execute.write_job", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, planned("mean_image"))


def test_a_gallery_that_cannot_be_written_costs_no_rows(tmp_path, planned, caplog):
    (tmp_path / "gallery").write_text("in the way")
    outcome = run(tmp_path, planned("mean_image"))
    assert outcome.statuses == {"ok": TRIALS}
    assert len(pd.read_parquet(outcome.path)) == TRIALS
    assert "no pictures" in caplog.text


def test_a_secret_season_and_labels_have_no_pictures(tmp_path, planned):
    secret = Season("spring", b"a secret of some length")
    assert run(tmp_path, planned("mean_image", season=secret)).statuses == {"ok": TRIALS}
    labels = TASK.model_copy(update={"target": "labels"})
    assert run(tmp_path, planned("prior_labels", task=labels)).statuses == {"ok": TRIALS}
    assert not list(tmp_path.glob("gallery/*"))


# --- the contact sheet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [None, [], [1.0], [0.0, 0.0], [1.0, -1e-9], [-1.0, 2.0], [1e-30, 1e30]])
def test_any_trace_can_be_drawn(trace):
    sheet = contact_sheet([job([1.0, 2.0, 3.0], [0, 1, 2], visible_loss_trace=trace)], "title")
    assert sheet.width > 500


def test_a_sheet_holds_the_pictures_of_every_rule(tmp_path):
    colors = {"best": (1, 200, 3), "median": (4, 5, 206), "worst": (207, 8, 9)}
    cell = [
        entry(rule=rule, recovered=gallery.strip(np.full((1, 3, 8, 8), 0, np.uint8) + np.uint8(c)[None, :, None, None]))
        for rule, c in colors.items()
    ]
    pixels = np.asarray(contact_sheet([cell], "title")).reshape(-1, 3)
    assert [int((pixels == color).all(1).sum()) for color in colors.values()] == [64 * 64] * 3


def test_the_command_writes_a_sheet_or_lists_the_pictures(tmp_path):
    gallery.write_gallery(tmp_path, "a", job([1.0, 2.0, 3.0], [0, 1, 2]))
    done = CliRunner().invoke(cli, ["gallery", str(tmp_path)])
    assert done.output.strip() == str(tmp_path / "gallery.png")
    assert Image.open(tmp_path / "gallery.png").format == "PNG"
    listed = json.loads(CliRunner().invoke(cli, ["gallery", str(tmp_path), "--json"]).output)
    assert [(e["rule"], e["trial"]) for e in listed] == [("best", 2), ("median", 1), ("worst", 0)]
    assert "true" not in listed[0]
    failed = CliRunner().invoke(cli, ["gallery", str(tmp_path), "--to", str(tmp_path / "no" / "where.png")])
    assert isinstance(failed.exception, UserError)
    assert "use another --to" in str(failed.exception)


@pytest.mark.parametrize("name", ["x.txt", "x", ".", "x.png.jpg"])
def test_a_sheet_is_written_to_png_files_only(tmp_path, name):
    gallery.write_gallery(tmp_path, "a", job([1.0, 2.0, 3.0], [0, 1, 2]))
    refused = CliRunner().invoke(cli, ["gallery", str(tmp_path), "--to", str(tmp_path / name)])
    assert isinstance(refused.exception, UserError)
    assert "expected a PNG file" in str(refused.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]


def test_the_command_does_not_import_torch(tmp_path):
    gallery.write_gallery(tmp_path, "a", job([1.0], [0]))
    code = (
        "import sys; from leakbench.cli import cli; "
        f"cli.main(['gallery', {str(tmp_path)!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
