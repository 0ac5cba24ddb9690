"""AutoLeak: what the expression stands for, and what the board makes of its members."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from board_rows import INPUTS, LABELS, frame, make

from leakbench import autoleak
from leakbench.autoleak import ENSEMBLES, FAMILIES, Ensemble, spelled_out
from leakbench.board.autoleak import autoleak as found_by
from leakbench.board.autoleak import members, overlap
from leakbench.board.defense_text import markdown
from leakbench.entries import resolve_all
from leakbench.errors import UserError
from leakbench.grids import Budget, Suite
from leakbench.listing import list_items, show_items
from leakbench.sources import sources
from leakbench.suites import load_suite


@pytest.fixture
def three(monkeypatch):
    """An ensemble of three members."""
    monkeypatch.setitem(ENSEMBLES, "labels", Ensemble(("a", "b", "c"), evaluations=100))


def suite(**grid):
    first = {"dataset": "digits", "architecture": "mlp", "target": ["labels", "inputs"], "attacks": ["autoleak"]} | grid
    return Suite.model_validate({"name": "s", "version": 1, "description": "d", "trials": 2, "grids": [first]})


def test_every_member_is_installed_recovers_its_target_and_is_spelled_as_its_rows_are():
    for target, ensemble in ENSEMBLES.items():
        for (_, text), (attack,) in resolve_all([("attack", text) for text in ensemble.members]).items():
            assert attack.label == text
            assert target in attack.description.recovers
            # What a member spends is bounded by its own parameters, so that no budget has to cut it short.
            spent = [attack.params[name] for name in ("steps", "restarts", "samples") if name in attack.params]
            assert int(np.prod(spent)) <= max(1, ensemble.evaluations)


def test_every_attack_of_a_family_is_installed_and_in_no_other():
    names = [name for attacks in FAMILIES.values() for name in attacks]
    assert set(names) <= set(sources("attack"))
    assert len(names) == len(set(names))
    assert autoleak.NAME not in sources("attack")
    assert autoleak.family("somebodys") == "somebodys"


def test_the_expression_stands_for_the_members_of_the_target_and_brings_the_control():
    cells = suite(defenses=["none", "topk(p=0.5)"]).expand()
    for target in ("labels", "inputs"):
        own = {(c.attack.label, c.label.rsplit(" / ", 1)[1]) for c in cells if c.task.target == target}
        chains = ("none", "topk(p=0.5)", "null_update")
        assert own == {(member, chain) for member in ENSEMBLES[target].members for chain in chains}
    beside = suite(target="labels", attacks=["autoleak", "idlg", "llg"]).expand()
    assert {c.attack.label for c in beside if c.defense} == set(ENSEMBLES["labels"].members)
    assert sum(c.attack.label == "llg" and not c.defense for c in beside) == 1
    assert not [c for c in suite(target="labels", attacks=["llg"]).expand() if c.defense]


def test_the_expression_replaces_a_suites_attacks_from_the_command_line_too():
    given = suite(target="labels", attacks=["idlg"]).expand(attacks=["autoleak"], defenses=["none"])
    chains = [(cell.attack.label, bool(cell.defense)) for cell in given]
    assert sorted(chains) == sorted((m, control) for m in ENSEMBLES["labels"].members for control in (False, True))


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("autoleak(steps=3)", {}, "autoleak without parameters"),
        ("autoleak", {"target": "membership"}, "'autoleak' recovers labels and inputs, expected an attack that"),
        ("autoleak", {"target": ["labels", "membership"]}, "'autoleak' recovers labels and inputs"),
        ("autoleek", {}, "autoleek"),
    ],
)
def test_a_wrong_use_is_one_line_that_says_where(tmp_path, text, grid, message):
    path = tmp_path / "s.yaml"
    content = {"dataset": "digits", "architecture": "mlp", "attacks": [text], **grid}
    path.write_text(json.dumps({"name": "s", "version": 1, "description": "d", "trials": 2, "grids": [content]}))
    with pytest.raises(UserError, match=r"grids\[0\].attacks: ") as error:
        load_suite(str(path))
    assert message in str(error.value)


def test_a_smaller_budget_is_refused_and_such_rows_are_no_score(three):
    with pytest.raises(UserError, match=r"write budget: \{model_evaluations: 500\}"):
        suite(target="inputs").model_copy(update={"budget": Budget(model_evaluations=10)}).expand()
    rich, poor = ([make([0.5] * 6, name, budget_model_evaluations=spent) for name in "abc"] for spent in (100, 99))
    assert len(found_by(frame(*rich))) == 1
    assert found_by(frame(*poor)).empty


def test_it_is_listed_and_shown_with_members_budget_and_version(monkeypatch):
    monkeypatch.setattr("leakbench.listing.sources", lambda _: {})
    assert [item["name"] for item in list_items("attacks")] == ["autoleak"]
    ((kind, item),) = show_items("autoleak")
    assert (kind, item["version"]) == ("attack", autoleak.VERSION)
    assert item["members"] == {target: list(ensemble.members) for target, ensemble in ENSEMBLES.items()}
    assert item["model_evaluations"] == {"labels": 0, "inputs": 500}
    assert autoleak.is_meant(" autoleak() ")
    assert not autoleak.is_meant("autoleaks")
    assert spelled_out(["llg", "autoleak"], ["labels"]) == tuple(dict.fromkeys(["llg", *ENSEMBLES["labels"].members]))


# --- the board --------------------------------------------------------------------------------------------------------

NULL = {"defense": "null_update"}


def worked(**changes):
    """Two members that are right on different trials, and one that is never better than the first."""
    return [
        make([1.0, 1.0, 1.0, 0.2, 0.2, 0.2], "a", **changes),
        make([0.2, 0.2, 0.2, 0.8, 0.8, 0.8], "b", **changes),
        make([0.9, 0.2, 0.2, 0.1, 0.1, 0.1], "c", **changes),
    ]


def test_the_headline_is_the_worst_mean_and_the_maximum_stands_beside_its_own_floor(three):
    nothing = [make([0.3, 0.1] * 3, "a", **NULL), make([0.1, 0.3] * 3, "b", **NULL), make([0.2] * 6, "c", **NULL)]
    lines = found_by(frame(*worked(), *nothing)).set_index("defense")
    line = lines.loc["none"]
    assert (line["worst_member"], line["worst"]) == ("a", pytest.approx(0.6))
    assert line["maximum"] == pytest.approx(0.9)
    assert line["maximum_floor"] == pytest.approx(0.3)
    assert json.loads(line["by_member"]) == {"a": 3, "b": 3, "c": 0}
    assert lines.loc["null_update", "worst"] == pytest.approx(0.2)
    assert line["missing"] is None
    assert line["maximum_low"] < 0.9 < line["maximum_high"]


def test_the_floor_of_the_maximum_is_over_the_same_members(three):
    declined = {"statuses": ["not_applicable"] * 6}
    nothing = [make([0.1] * 6, "a", **NULL), make([0.5] * 6, "b", **NULL), make([0.1] * 6, "c", **NULL)]
    parts = [make([1.0] * 6, "a"), make([None] * 6, "b", **declined), make([0.1] * 6, "c")]
    line = found_by(frame(*parts, *nothing)).set_index("defense").loc["none"]
    assert (line["members"], line["declined"], line["missing"], line["complete"]) == (2, "b", None, True)
    assert line["maximum_floor"] == pytest.approx(0.1)
    assert np.isnan(found_by(frame(*parts)).loc[0, "maximum_floor"])


def test_what_a_member_adds_is_the_drop_without_it_and_one_that_adds_nothing_is_named(three):
    other = worked(defense="noise")
    other[1] = make([0.7] * 6, "b", defense="noise")
    nothing = [make([0.1] * 6, name, **NULL) for name in "abc"]
    unknown = members(frame(*worked(), *other)).set_index("member")["adds"]
    assert unknown.to_dict() == {"a": None, "b": None, "c": None}
    table = members(frame(*worked(), *other, *nothing)).set_index("member")
    # none: means .6, .5, .233; noise: .6, .7, .233
    assert table["worst_drop"].to_dict() == pytest.approx({"a": 0.05, "b": 0.05, "c": 0})
    assert table["worst_drop_most"].to_dict() == pytest.approx({"a": 0.1, "b": 0.1, "c": 0})
    assert table.loc["a", "worst_drop_where"] == f"{LABELS.id} vs none"
    # maximum of none: .9; without a (.9 + .2 + .2 + 2.4) / 6, without b (3 + .6) / 6; of noise: .85, .7333, .6
    drops = [0.9 - 3.7 / 6, 0.9 - 0.6], [0.85 - (0.9 + 5 * 0.7) / 6, 0.85 - 0.6]
    assert table.loc[["a", "b"], "maximum_drop"].tolist() == pytest.approx(np.mean(drops, axis=0))
    assert table["worst_in"].to_dict() == {"a": 1, "b": 1, "c": 0}
    assert table["adds"].to_dict() == {"a": True, "b": True, "c": False}


def test_a_member_that_only_guesses_adds_to_the_maximum_no_more_than_on_the_control(three):
    rng = np.random.default_rng(0)
    guesses = [list(rng.uniform(0, 0.4, 40)) for _ in range(4)]
    rows = [make([0.3] * 40, "a"), make(guesses[0], "b"), make([0.3] * 40, "a", **NULL), make(guesses[0], "b", **NULL)]
    table = members(frame(*rows)).set_index("member")
    assert table.loc["b", "maximum_drop"] == table.loc["b", "maximum_drop_floor"] > 0
    assert not table.loc["b", "adds"]
    assert table.loc["a", "adds"]


def test_overlap_is_how_often_another_does_as_well_where_a_member_leaks(three):
    table = overlap(frame(*worked(), make([1.0] * 6, "b", **NULL))).set_index(["member", "other"])
    assert table["trials"].to_dict() == {
        ("a", "b"): 3, ("a", "c"): 3, ("b", "a"): 3, ("b", "c"): 3, ("c", "a"): 1, ("c", "b"): 1
    }  # fmt: skip
    assert table["share"].to_dict() == {
        ("a", "b"): 0, ("a", "c"): 0, ("b", "a"): 0, ("b", "c"): 0, ("c", "a"): 1, ("c", "b"): 0
    }  # fmt: skip


def test_only_rows_spelled_as_a_member_count():
    first, member, *_ = ENSEMBLES["inputs"].members
    own = make([20.0] * 6, "inverting_gradients", task=INPUTS, attack_params='{"steps": 500}')
    other = make([30.0] * 6, "inverting_gradients", task=INPUTS, attack_params='{"steps": 4800}')
    beside = make([15.0] * 6, first, task=INPUTS)
    line = found_by(frame(own, other, beside)).iloc[0]
    assert (line["worst_member"], line["worst"], line["members"]) == (member, 20, 2)


def test_of_two_versions_of_a_member_the_newest_counts_and_it_is_said(three):
    versions = {2: [0.5] * 6, 1: [0.9] * 6}
    parts = [make(values, "a", attack_version=number) for number, values in versions.items()]
    # of sources with the same version the one that ran last
    days = {"y": datetime(2026, 1, 2, tzinfo=UTC), "x": datetime(2026, 1, 3, tzinfo=UTC)}
    parts += [make([0.4 if s == "x" else 0.8] * 6, "b", attack_source_sha256=s, utc=day) for s, day in days.items()]
    table = found_by(frame(*parts, make([0.3] * 6, "c")))
    assert (table.loc[0, "worst_member"], table.loc[0, "worst"]) == ("a", pytest.approx(0.5))
    assert (table.loc[0, "maximum"], table.loc[0, "members"]) == (pytest.approx(0.5), 3)
    assert table.loc[0, "older"] == "a, b"
    assert "older version, or of another source, are left out: a, b" in markdown({"autoleak": table})


def test_an_incomplete_ensemble_has_no_score_and_one_of_less_than_half_no_line(three):
    parts = worked()
    two = found_by(frame(*parts[:2]))
    assert two.loc[0, ["complete", "missing", "declined"]].tolist() == [False, "c", None]
    assert "incomplete 2/3 (0.60)" in markdown({"autoleak": two})
    assert found_by(frame(*parts)).loc[0, "complete"]
    assert "incomplete" not in markdown({"autoleak": found_by(frame(*parts))})
    assert found_by(frame(parts[0])).empty


def test_what_a_member_adds_is_not_known_without_a_control(three):
    text = markdown({"members": members(frame(*worked()))})
    assert text.count("| ? |") == 3
    assert "?: not known, as nobody attacked null_update" in text
