"""`leakbench evaluate`: an entry beside baselines on a tiny suite, whatever state its file and the folder are in."""

from __future__ import annotations

import json

import pytest
import yaml

from leakbench.errors import UserError
from leakbench.results import load_rows
from leakbench.sources import find_source
from leakbench.submitting.evaluate import evaluate_file, text
from leakbench.submitting.skeletons import new_entry

pytestmark = pytest.mark.usefixtures("one_cache")

SUITE = {
    "name": "tiny",
    "version": 1,
    "description": "labels and inputs of embedded digits",
    "trials": 6,
    "budget": {"wall_seconds": 30, "model_evaluations": 10},
    "grids": [
        {
            "dataset": "digits",
            "architecture": "mlp",
            "batch": 4,
            "attacks": ["llg", "random_labels"],
            "defenses": ["none", "gaussian_noise(std=0.01)"],
        },
        {
            "dataset": "digits",
            "architecture": "mlp",
            "batch": 1,
            "threat_model": {"labels": True},
            "target": "inputs",
            "attacks": "random_image",
        },
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with skeletons, two suites, and the rows of the suite's baselines."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SUITE))
    (folder / "labels.yaml").write_text(yaml.safe_dump(SUITE | {"grids": SUITE["grids"][:1]}))
    new_entry("attack", "try_labels", folder / "try_labels.py")
    new_entry("attack", "try_inputs", folder / "try_inputs.py", recovers="inputs")
    new_entry("defense", "try_noise", folder / "try_noise.py")
    return folder


@pytest.fixture(scope="module")
def first(one_cache, place):
    """The skeleton of a defense, whose baselines include those of attacks."""
    return evaluated(place, "try_noise")


def evaluated(place, name, suite="tiny", **options):
    options = {"out": place / "out" / name, "isolation": "none", "workers": 1} | options
    return evaluate_file(str(place / f"{name}.py"), str(place / f"{suite}.yaml"), **options)


def own(found):
    (line,) = found.table[found.table["own"]].to_dict("records")
    return line


def test_a_defense_stands_beside_the_suites_on_every_task(place, first):
    assert first.counts == {"ok": 18}
    assert first.failed == []
    lines = {task: set(part["label"]) for task, part in first.table.groupby("task")}
    assert len(lines) == 2
    assert {"none", "try_noise(share=0.1)"} in lines.values()
    assert {"none", "gaussian_noise(std=0.01)", "try_noise(share=0.1)"} in lines.values()
    said = text(first)
    assert sum(line.startswith("> ") for line in said) == 2
    assert not any("nan" in line for line in said)
    ours = [line for line in said if "try_noise(" in line]
    assert all("not ranked: not run: bayes_adaptive" in line for line in ours), "as of the suite's own"
    assert any("--suite defenses_quick" in line and "they have to know it" in line for line in said)
    assert said[-1].startswith("claimed")


def test_an_attack_is_ranked_by_its_own_rows_among_rows_at_hand(place, first):
    found = evaluated(place, "try_labels", against=(place / "out" / "try_noise" / "baselines",))
    assert found.counts == {"ok": 6}
    assert set(found.table["label"]) == {"try_labels", "llg", "random_labels"}
    assert own(found)["mean"] == pytest.approx(load_rows(found.out)["instance_recall"].mean())
    assert not (place / "out" / "try_labels" / "baselines").exists()
    assert any(line.startswith("  would be in rank group 1 of") for line in text(found))
    assert json.loads(json.dumps(found.content(), allow_nan=False))["badge"] == "claimed"


def test_an_attack_on_inputs_runs_on_the_tasks_that_ask_for_them(place, first):
    found = evaluated(place, "try_inputs", against=(place / "out" / "try_noise" / "baselines",))
    assert found.counts == {"ok": 6}
    assert set(found.table["label"]) == {"try_inputs", "random_image"}
    with pytest.raises(UserError, match="recovers inputs, expected one that recovers labels"):
        evaluated(place, "try_inputs", "labels")


def test_after_an_edit_nothing_of_the_file_before_is_shown_and_a_crash_says_why(place, first, leakbench):
    path, out, against = place / "edited.py", place / "out" / "edited", place / "out" / "try_noise" / "baselines"
    path.write_text((place / "try_labels.py").read_text())
    assert evaluated(place, "edited", "labels", against=(against,)).counts == {"ok": 6}
    mark = "        # A gradient, or the change"
    path.write_text(path.read_text().replace(mark, f"        raise ValueError('boom')\n{mark}"))
    crashed = evaluated(place, "edited", "labels", against=(against,)).content()
    suite = place / "labels.yaml"
    code, said, _ = leakbench("evaluate", path, "--suite", suite, "--out", out, "--against", against, "--json")
    assert json.loads(said) == crashed, "its rows were there"
    assert code == 1
    assert crashed["counts"] == {"error": 6}
    assert ["6 error: attack: ValueError: boom" in line for line in crashed["failed"]] == [True]
    assert [line["edge"] for line in crashed["table"] if line["own"]] == [None]
    assert sum(line["attack_label"] == "try_labels" for line in crashed["table"]) == 1


def test_a_new_version_of_a_baseline_stands_beside_it(place, first):
    source = find_source("attack", "llg").path.read_text()
    (place / "llg.py").write_text(source.replace('@register("llg", version=2)', '@register("llg", version=99)'))
    found = evaluated(place, "llg", against=(place / "out" / "try_noise" / "baselines",))
    assert set(found.table["label"]) == {"llg v2", "llg v99", "random_labels"}
    assert own(found)["label"] == "llg v99"
    assert any("llg v2" in line for line in text(found) if "rank group" in line)


def test_rows_of_other_victims_are_no_comparison_and_that_is_said(place, first):
    baselines = (place / "out" / "try_noise" / "baselines",)
    many = evaluated(place, "try_labels", "labels", trials=2, against=baselines, out=place / "two")
    assert many.compared == 4, "the same trials of more"
    lone = evaluated(place, "try_labels", "labels", against=(place / "two" / "entry",), out=place / "lone")
    assert lone.compared == 0
    assert any(line.startswith("nothing to compare with") for line in text(lone))
    assert set(lone.table["label"]) == {"try_labels"}
    assert "  not ranked: fewer than 6 victims" in text(many)


def test_what_cannot_be_evaluated_is_said_before_anything_runs(place):
    for arguments, says in (
        ({"name": "none"}, "no file"),
        ({"name": "try_labels", "suite": "none"}, "no file|unknown suite|none.yaml"),
        ({"name": "try_labels", "against": (place / "nothing",)}, "no directory"),
    ):
        with pytest.raises(UserError, match=says):
            evaluated(place, **arguments, **({} if "against" in arguments else {"against": ()}), out=place / "never")
    assert not (place / "never").exists()


def test_a_row_run_from_a_file_says_what_it_takes_to_run_it_again(place, first, leakbench):
    folder = place / "out" / "try_noise" / "entry"
    row = load_rows(folder)["job_id"].iloc[0]
    code, _, err = leakbench("reproduce", row, "--rows", folder)
    assert code == 2
    assert "defense 'try_noise' is not installed" in err
    assert "--entry path/to/try_noise.py" in err
    assert "expected JOB or JOB:TRIAL" in leakbench("reproduce", f"{row}:9999999999")[2]


def test_rows_that_are_not_there_are_named_with_those_that_are(place, first, leakbench):
    folder = place / "out" / "try_noise" / "entry"
    for option, there in (("--attack", "random_image"), ("--defense", "try_noise"), ("--task", "digits-mlp-")):
        code, out, err = leakbench("rows", folder, option, "nosuch")
        assert (code, out) == (2, "")
        assert there in err
    code, out, _ = leakbench("rows", folder, "--attack", "llg", "--task", "digits-mlp")
    assert (code, len(out.splitlines())) == (0, 6)


def test_drift_says_which_folder_has_no_rows(place, first, leakbench):
    folder = place / "out" / "try_noise" / "entry"
    (place / "empty").mkdir()
    for then, now, says in (
        (folder, place / "nope", "no folder"),
        (place / "nope", folder, "no folder"),
        (folder, place / "empty", "no rows of attacks in"),
        (folder, place / "out" / "try_noise" / "baselines", "no job is both"),
    ):
        assert says in leakbench("drift", then, now)[2]
