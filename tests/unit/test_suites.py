"""Suites: expansion and one-line errors."""

from __future__ import annotations

from itertools import product

import pytest
import yaml

from leakbench import entries
from leakbench.errors import UserError
from leakbench.suites import load_suite, load_task

ATTACKS = {"attack_labels": ["labels"], "attack_inputs": ["inputs"], "attack_both": ["labels", "inputs"]}
DEFENSES = {"blur": {"std": 0.5}, "prune": {"p": 0.9}}


@pytest.fixture
def known(monkeypatch, tmp_path):
    """Replace the installed entries by small ones that no child has to describe."""
    from leakbench import sources
    from leakbench.registry import Registry
    from leakbench.runner import isolate

    registries = {"attack": Registry("attack"), "defense": Registry("defense")}
    for kind, names in (("attack", ATTACKS), ("defense", DEFENSES)):
        for name in names:
            file = tmp_path / f"{name}.py"
            file.write_text(f"# {name}")
            registries[kind].register(name, sources.EntrySource(kind, name, name, name, file, None, tmp_path, "test"))

    def describe(requests, isolation):
        base = {"class_name": "X", "version": 1, "reference": "", "summary": ""}
        return [
            {
                "ok": {
                    **base,
                    "name": r["name"],
                    "recovers": ATTACKS.get(r["name"], []),
                    "params": DEFENSES.get(r["name"], {}),
                }
            }
            for r in requests
        ]

    monkeypatch.setattr(sources, "sources", lambda kind: registries[kind])
    monkeypatch.setattr(isolate, "describe_entries", describe)
    monkeypatch.setattr(entries, "_described", {})
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))


def content(**grid):
    first = {"dataset": "digits", "architecture": "mlp", "attacks": ["attack_labels"], **grid}
    return {"name": "tiny", "version": 1, "description": "d", "trials": 4, "grids": [first]}


def load(tmp_path, value):
    path = tmp_path / "tiny.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return load_suite(str(path))


def error_of(tmp_path, value):
    with pytest.raises(UserError) as error:
        load(tmp_path, value)
    text = str(error.value)
    assert "\n" not in text
    assert "tiny.yaml" in text
    return text


# --- expansion --------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes(known, tmp_path):
    suite = load(
        tmp_path,
        content(
            dataset=["digits", "mnist"],
            architecture=["mlp", {"name": "lenet_zhu", "init": "uniform(0.5)"}],
            stage=["untrained", "converged"],
            batch=[8, {"size": 4, "sampler": "unbalanced"}],
            protocol=["gradient", {"sends": "delta", "local_steps": 2, "lr": 0.1}],
            attacks=["attack_labels", "attack_both"],
            defenses=["none", "blur(std=1)", "prune+blur"],
        ),
    )
    cells = suite.expand()
    axes = (2, 2, 2, 2, 2, 2, 3)
    expected = 1
    for size in axes:
        expected *= size
    assert len(cells) == expected
    assert len({(c.task.hash, c.attack.label, tuple(d.label for d in c.defense)) for c in cells}) == expected
    seen = {(c.task.dataset, c.task.architecture.name, c.task.stage, c.task.batch.size) for c in cells}
    assert seen == set(product(["digits", "mnist"], ["mlp", "lenet_zhu"], ["untrained", "converged"], [8, 4]))


def test_a_scalar_is_an_axis_of_one_value(known, tmp_path):
    scalar = load(tmp_path, content(batch=8, stage="early", defenses="blur", attacks="attack_labels"))
    listed = load(tmp_path, content(batch=[8], stage=["early"], defenses=["blur"], attacks=["attack_labels"]))
    assert scalar == listed


def test_equal_cells_are_kept_once_whatever_they_are_written_as(known, tmp_path):
    value = content(defenses=["blur", "blur(std=0.5)", "none"])
    value["grids"] += [dict(value["grids"][0])]
    assert len(load(tmp_path, value).expand()) == 2


def test_a_grid_may_override_trials_and_model_draws(known, tmp_path):
    value = content(trials=9, model_draws="per_trial")
    value["grids"].append(content(stage="early")["grids"][0])
    first, second = load(tmp_path, value).expand()
    assert (first.trials, first.model_draws, second.trials, second.model_draws) == (9, "per_trial", 4, "one")
    assert {cell.trials for cell in load(tmp_path, value).expand(trials=3)} == {3}


def test_given_attacks_replace_those_of_the_grids_whose_target_they_recover(known, tmp_path):
    value = content()
    value["grids"].append(content(target="inputs", attacks="attack_inputs")["grids"][0])
    suite = load(tmp_path, value)
    assert {(c.task.target, c.attack.name) for c in suite.expand(attacks=["attack_labels"])} == {
        ("labels", "attack_labels")
    }
    assert {(c.task.target, c.attack.name) for c in suite.expand(attacks=["attack_both"])} == {
        ("labels", "attack_both"),
        ("inputs", "attack_both"),
    }
    assert {tuple(d.name for d in c.defense) for c in suite.expand(defenses=["blur"])} == {("blur",)}
    with pytest.raises(UserError, match="recovers inputs, expected one that recovers labels"):
        load(tmp_path, content()).expand(attacks=["attack_inputs"])


def test_adding_an_attack_or_a_task_changes_no_other_cell(known, tmp_path):
    small = load(tmp_path, content()).expand()
    large = load(tmp_path, content(attacks=["attack_both", "attack_labels"], stage=["early", "untrained"])).expand()
    assert [cell for cell in large if cell in small] == small


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_is_found_by_id_and_by_hash(known, tmp_path):
    suite = load(tmp_path, content(stage=["untrained", "early"]))
    for task in suite.tasks().values():
        assert load_task(f"{tmp_path}/tiny.yaml:{task.id}") == task
        assert load_task(f"{tmp_path}/tiny.yaml:{task.hash[:10]}") == task
    with pytest.raises(UserError, match="Did you mean 'digits-mlp-early-b1-iid-gradient-labels'"):
        load_task(f"{tmp_path}/tiny.yaml:digits-mlp-erly-b1-iid-gradient-labels")
    with pytest.raises(UserError, match="expected SUITE:TASK"):
        load_task("digits")


def test_a_task_id_that_names_several_tasks_offers_their_hashes(known, tmp_path):
    suite = load(tmp_path, content(threat_model=[{"lr": True}, {"lr": False}]))
    (name,) = {task.id for task in suite.tasks().values()}
    with pytest.raises(UserError, match="expected one task, got 2") as error:
        load_task(f"{tmp_path}/tiny.yaml:{name}")
    for key in suite.tasks():
        assert key[:12] in str(error.value)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "messages"),
    [
        ({"batchh": 3}, ["grids[0].batchh: unknown key", "Did you mean 'batch'"]),
        ({"batch": {"size": "8"}}, ["grids[0].batch.size: expected an integer", "'8'"]),
        ({"batch": [1, {"sise": 3}]}, ["grids[0].batch[1].sise: unknown key", "Did you mean 'size'"]),
        ({"batch": 0}, ["grids[0].batch.size", "greater than or equal to 1", "got 0"]),
        ({"batch": {"size": 4, "sampler": "unbalnced"}}, ["grids[0].batch.sampler", "Did you mean 'unbalanced'"]),
        ({"batch": {"size": 11, "sampler": "unique"}}, ["grids[0].batch", "at most 10", "got size 11"]),
        ({"batch": {"size": 4, "sampler": "dirichlet"}}, ["grids[0].batch", "alpha"]),
        ({"stage": ["early", "convergd"]}, ["grids[0].stage[1]", "Did you mean 'converged'"]),
        ({"protocol": "gradent"}, ["grids[0].protocol.sends", "Did you mean 'gradient'"]),
        ({"protocol": {"sends": "gradient", "local_steps": 3}}, ["grids[0].protocol", "one step"]),
        ({"threat_model": {"labels": "maybe"}}, ["grids[0].threat_model.labels: expected true or false", "'maybe'"]),
        ({"threat_model": {"change_parameters": True}}, ["grids[0].threat_model", "malicious_server"]),
        ({"threat_model": 3}, ["grids[0].threat_model: expected a mapping", "got 3"]),
        ({"architecture": {"name": "mlp", "init": "normal"}}, ["grids[0].architecture", "uniform(A)"]),
        ({"architecture": {"init": "default"}}, ["grids[0].architecture.name: expected this key"]),
        ({"architecture": "lenet_zu"}, ["grids[0].architecture", "Did you mean 'lenet_zhu'"]),
        ({"dataset": "mnits"}, ["grids[0].dataset", "Did you mean 'mnist'"]),
        ({"dataset": "gone.npz"}, ["grids[0].dataset", "gone.npz"]),
        ({"target": "label"}, ["grids[0].target", "Did you mean 'labels'"]),
        ({"target": "attribute", "attribute": "sight"}, ["grids[0].attribute", "unknown attribute of dataset digits"]),
        (
            {"target": "attribute", "attribute": {"name": "parity", "value": 7}},
            ["grids[0].attribute", "expected a value in 0..1, got 7"],
        ),
        ({"measures": "sensitivty"}, ["grids[0].measures", "Did you mean 'sensitivity'"]),
        ({"attacks": []}, ["grids[0]: expected attacks, measures or both, got neither"]),
        ({"attacks": "attack_label"}, ["grids[0].attacks", "Did you mean 'attack_labels'"]),
        ({"attacks": "attack_inputs"}, ["grids[0].attacks", "recovers labels"]),
        ({"attacks": "attack_labels(x=1)"}, ["grids[0].attacks", "no parameter 'x'"]),
        ({"defenses": ["none", "blurr"]}, ["grids[0].defenses", "Did you mean 'blur'"]),
        ({"defenses": "blur(st=1)"}, ["grids[0].defenses", "Did you mean 'std'"]),
        ({"defenses": "blur(std='x')"}, ["grids[0].defenses", "expected a number"]),
        ({"defenses": "blur(1)"}, ["grids[0].defenses", "keyword"]),
        ({"trials": 0}, ["grids[0].trials", "got 0"]),
        ({3: 4}, ["grids[0]", "3"]),
    ],
)
def test_a_mistake_in_a_grid_is_one_line_with_its_key(known, tmp_path, grid, messages):
    text = error_of(tmp_path, content() | {"grids": [content()["grids"][0] | grid]})
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"trials": 0}, ["trials", "greater than or equal to 1", "got 0"]),
        ({"trials": -5}, ["trials", "got -5"]),
        ({"trials": "many"}, ["trials", "expected an integer", "'many'"]),
        ({"trails": 5}, ["trails: unknown key", "Did you mean 'trials'"]),
        ({"budget": {"wall_second": 3}}, ["budget.wall_second", "Did you mean 'wall_seconds'"]),
        ({"budget": {"wall_seconds": -1}}, ["budget.wall_seconds", "got -1"]),
        ({"grids": {}}, ["grids: expected a list"]),
        ({"grids": []}, ["grids: expected at least one value"]),
        ({"grids": [3]}, ["grids[0]: expected a mapping", "got 3"]),
        ({"name": "a/b"}, ["name", "'a/b'"]),
        ({"model_draws": "two"}, ["model_draws", "'one' or 'per_trial'"]),
    ],
)
def test_a_mistake_in_a_suite_is_one_line_with_its_key(known, tmp_path, change, messages):
    text = error_of(tmp_path, content() | change)
    for message in messages:
        assert message in text


@pytest.mark.parametrize("key", ["name", "version", "description", "trials", "grids"])
def test_a_missing_key_is_named(known, tmp_path, key):
    assert f"{key}: expected this key" in error_of(tmp_path, {k: v for k, v in content().items() if k != key})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name: x\n  bad: [", "line 2"),
        (
            "name: x\ntrials: 3\nname: y\n",
            "line 3, column 1: expected well-formed YAML, got: key 'name' is given twice",
        ),
        ("grids: [1, 2\n", "line 2"),
        ("a: !!python/object:os.system x", "line 1"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: \x00", "expected well-formed YAML"),
        ("{[1]: 2}", "expected"),
        ("[" * 5000, "expected well-formed YAML"),
    ],
)
def test_malformed_yaml_is_one_line_with_its_place(known, tmp_path, text, where):
    assert where in error_of(tmp_path, text)


def test_numbers_in_scientific_notation_are_numbers(known, tmp_path):
    text = yaml.safe_dump(content()).replace(
        "architecture: mlp", "protocol: {sends: delta, lr: 1e-3}\n  architecture: mlp"
    )
    (task,) = load(tmp_path, text).tasks().values()
    assert task.protocol.lr == 0.001


def test_an_unknown_suite_names_the_nearest(known):
    with pytest.raises(UserError, match="Did you mean 'quick'"):
        load_suite("quik")
    with pytest.raises(UserError, match="got no such file"):
        load_suite("nowhere/tiny.yaml")
