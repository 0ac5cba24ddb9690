"""Expressions, sources and descriptions of entries."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leakbench import entries
from leakbench.entries import Call, Description, EntrySpec, describe, merge_params, parse_expression, resolve
from leakbench.errors import UserError
from leakbench.sources import find_source, sources

VALUES = st.one_of(
    st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(str.isidentifier)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- expressions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("none", ()),
        ("llg", (Call("llg", {}),)),
        ("llg()", (Call("llg", {}),)),
        ("topk(p=0.9)+gaussian_noise(std=1e-3)", (Call("topk", {"p": 0.9}), Call("gaussian_noise", {"std": 0.001}))),
        ("a(x='it\\'s+\"')+b", (Call("a", {"x": "it's+\""}), Call("b", {}))),
        ("a(x=1e+3) + b(y='(+')", (Call("a", {"x": 1000.0}), Call("b", {"y": "(+"}))),
        ("my dir/file.py:Class(n=-3, on=True)", (Call("my dir/file.py:Class", {"n": -3, "on": True}),)),
    ],
)
def test_expressions_parse(text, calls):
    assert parse_expression(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        *("", "+", "a+", "a(", "a(1)", "a(**x)", "a(x=y)", "a(x=[1])", "a(x=1, x=2)", "a(x=1)b", "a(x=1e999)", "a(x=1"),
        *("a(x=__import__('os'))", "a(x=" + "(" * 500 + ")"),
    ],
)
def test_malformed_expressions_give_one_line(text):
    with pytest.raises(UserError) as error:
        parse_expression(text)
    assert "expected" in one_line(error) or "twice" in one_line(error)


@settings(deadline=None)  # a busy machine is no failure
@example([("a", {"a": "\\"}), ("a", {})])
@given(st.lists(st.tuples(NAMES.filter(lambda n: n != "none"), st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1))
def test_an_expression_written_from_calls_parses_back(calls):
    import keyword

    calls = [(ref, {k: v for k, v in params.items() if not keyword.iskeyword(k)}) for ref, params in calls]
    text = "+".join(f"{ref}({', '.join(f'{k}={v!r}' for k, v in params.items())})" for ref, params in calls)
    assert parse_expression(text) == tuple(Call(ref, params) for ref, params in calls)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out packages of third parties whose import would be noticed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []

    def add(files, *, point, package="third", group="leakbench.attacks", name="entry"):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("raise RuntimeError('imported')\n" + text)
        distribution = importlib.metadata.PathDistribution(tmp_path / f"{package}.dist-info")
        (tmp_path / f"{package}.dist-info").mkdir(exist_ok=True)
        (tmp_path / f"{package}.dist-info" / "METADATA").write_text(f"Name: {package}\n")
        found.append(importlib.metadata.EntryPoint(name, point, group)._for(distribution))
        return tmp_path

    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point for point in found if point.group == group]
    )
    sources.cache_clear()
    yield add
    sources.cache_clear()


def test_a_package_folder_is_one_entry_per_public_module(install):
    install({"p1/__init__.py": "", "p1/sub/__init__.py": "", "p1/sub/a.py": "", "p1/sub/_b.py": ""}, point="p1.sub")
    registry = sources("attack")
    assert registry.names() == ["a"]
    assert registry.get("a").module == "p1.sub.a"
    assert sources("defense").names() == []


@pytest.mark.parametrize(
    ("point", "module", "cls"), [("p2.mod", "p2.mod", None), ("p2.mod:Cls", "p2.mod", "Cls"), ("p2:Cls", "p2", "Cls")]
)
def test_a_module_or_class_is_one_entry_named_by_the_entry_point(install, point, module, cls):
    install({"p2/__init__.py": "", "p2/mod.py": ""}, point=point, name="mine")
    source = sources("attack").get("mine")
    assert (source.module, source.class_name) == (module, cls)


def test_a_top_level_module_is_an_entry(install):
    folder = install({"alone_xyz.py": ""}, point="alone_xyz", name="alone")
    assert sources("attack").get("alone").files == (folder / "alone_xyz.py",)


def test_finding_and_hashing_import_nothing(install):
    install({"p3/__init__.py": "", "p3/a.py": "from . import b", "p3/b.py": ""}, point="p3", name="x")
    for name in sources("attack").names():
        assert len(sources("attack").get(name).sha256) == 64
    assert not any(name.split(".")[0] == "p3" for name in sys.modules)


def test_two_packages_with_one_name_are_an_error_that_names_both(install):
    install({"p4/__init__.py": "", "p4/same.py": ""}, point="p4", package="first")
    install({"p5/__init__.py": "", "p5/same.py": ""}, point="p5", package="second")
    with pytest.raises(UserError, match=r"(?s)'same'.*first.*second"):
        sources("attack")


def test_an_entry_point_that_leads_nowhere_names_its_package(install):
    install({"p6/__init__.py": ""}, point="p6.gone", package="broken")
    with pytest.raises(UserError, match=r"broken.*p6\.gone"):
        sources("attack")


def test_the_source_hash_covers_what_importing_reads_and_nothing_else(install):
    files = {
        "p7/__init__.py": "",
        "p7/sub/__init__.py": "",
        "p7/sub/entry.py": "from p7.sub._near import f\nfrom ..far import g\nimport numpy",
        "p7/sub/_near.py": "from . import _nearer",
        "p7/sub/_nearer.py": "",
        "p7/far.py": "import p7.deep.module",
        "p7/deep/__init__.py": "",
        "p7/deep/module.py": "",
        "p7/sub/other.py": "",
    }
    folder = install(files, point="p7.sub.entry", name="entry")

    def now():
        sources.cache_clear()
        return sources("attack").get("entry").sha256

    before = now()
    assert {path.relative_to(folder).as_posix() for path in sources("attack").get("entry").files} == set(files) - {
        "p7/sub/other.py"
    }
    (folder / "p7/sub/other.py").write_text("changed = 1")
    assert now() == before
    for name in set(files) - {"p7/sub/other.py"}:
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n# changed")
        assert now() != before, name
        (folder / name).write_text(text)
    assert now() == before


def test_a_file_is_a_source_by_its_path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    source = find_source("defense", f"{file}:Mine")
    assert (source.path, source.class_name, source.module, source.files) == (file, "Mine", None, (file,))
    with pytest.raises(UserError, match="got no file"):
        find_source("defense", f"{tmp_path}/gone.py:Mine")


def test_an_unknown_entry_names_the_nearest(install):
    install({"p8/__init__.py": "", "p8/inverting.py": ""}, point="p8")
    with pytest.raises(UserError, match="Did you mean 'inverting'"):
        find_source("attack", "invertin")


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def child(monkeypatch, tmp_path):
    """A stand-in for the describe child that counts its calls."""
    from leakbench.runner import isolate

    asked = []
    fields = {"version": 1, "reference": "A 2020", "summary": "s", "class_name": "X", "recovers": ["labels"]}

    def fake(requests, isolation="auto"):
        asked.append([request["path"] for request in requests])
        bad = {"error": "ImportError: no module named 'nothing'"}
        return [
            bad if "bad" in r["path"] else {"ok": {**fields, "name": r["name"], "params": {"p": 0.5}}} for r in requests
        ]

    monkeypatch.setattr(isolate, "describe_entries", fake)
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(entries, "_described", {})
    return asked


def entry_file(tmp_path, name="good.py", text="x = 1"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_description_is_asked_for_once_per_source(child, tmp_path, monkeypatch):
    file = entry_file(tmp_path)
    first = describe([find_source("attack", file)])
    monkeypatch.setattr(entries, "_described", {})
    assert describe([find_source("attack", file)]) == first
    assert len(child) == 1
    entry_file(tmp_path, text="x = 2")
    assert describe([find_source("attack", file)])[0].source_sha256 != first[0].source_sha256
    assert len(child) == 2


def test_a_corrupted_cache_entry_is_made_again(child, tmp_path, monkeypatch):
    file = entry_file(tmp_path)
    first = describe([find_source("attack", file)])
    for damage in (b"", b"{", b'{"kind": "attack"}'):
        (path,) = (tmp_path / "cache" / "describe").iterdir()
        path.write_bytes(damage)
        monkeypatch.setattr(entries, "_described", {})
        assert describe([find_source("attack", file)]) == first
    assert len(child) == 4


def test_a_cache_that_cannot_be_written_costs_time_only(child, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file, not a folder")
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "blocked"))
    assert describe([find_source("attack", entry_file(tmp_path))])[0].name == "good"


def test_many_expressions_cost_one_child(child, tmp_path):
    files = [entry_file(tmp_path, f"good{i}.py", f"x = {i}") for i in range(4)]
    entries.resolve_all([("attack", file) for file in files])
    assert len(child) == 1


def test_a_file_that_fails_to_import_is_one_line_with_its_path(child, tmp_path):
    with pytest.raises(UserError, match=r"bad\.py.*ImportError") as error:
        resolve("attack", entry_file(tmp_path, "bad.py"))
    one_line(error)


def test_nonsense_from_a_child_is_one_line(child, tmp_path, monkeypatch):
    from leakbench.runner import isolate

    monkeypatch.setattr(
        isolate, "describe_entries", lambda requests, isolation: [{"ok": {"name": "../x", "version": []}}]
    )
    with pytest.raises(UserError, match=r"good\.py") as error:
        resolve("attack", entry_file(tmp_path))
    one_line(error)


def test_attacks_are_not_chained(child, tmp_path):
    file = entry_file(tmp_path)
    for text in (f"{file}+{file}", "none"):
        with pytest.raises(UserError, match="expected one attack"):
            resolve("attack", text)
    assert [part.name for part in resolve("defense", f"{file}+{file}")] == ["good", "good"]
    assert resolve("defense", "none") == ()


# --- parameters -------------------------------------------------------------------------------------------------------

DESCRIPTION = Description(
    kind="defense",
    name="topk",
    class_name="TopK",
    version=1,
    reference="",
    summary="",
    params={"p": 0.5, "steps": 3, "each": True, "how": "layer", "seed": None},
    required=("k",),
    strength=("p", "higher"),
)


def test_defaults_are_merged_and_integers_become_the_floats_they_stand_for():
    merged = merge_params(DESCRIPTION, {"k": 1, "p": 1, "seed": "any"})
    assert merged == {"k": 1, "p": 1.0, "steps": 3, "each": True, "how": "layer", "seed": "any"}
    assert isinstance(merged["p"], float)


@pytest.mark.parametrize(
    ("given_params", "message"),
    [
        ({"k": 1, "stps": 4}, "Did you mean 'steps'"),
        ({}, "needs the parameter 'k'"),
        ({"k": 1, "p": "0.5"}, "expected a number"),
        ({"k": 1, "p": True}, "expected a number"),
        ({"k": 1, "steps": 2.5}, "expected an integer"),
        ({"k": 1, "steps": True}, "expected an integer"),
        ({"k": 1, "each": 1}, "expected True or False"),
        ({"k": 1, "how": 1}, "expected a string"),
    ],
)
def test_a_wrong_parameter_is_one_line(given_params, message):
    with pytest.raises(UserError, match=message) as error:
        merge_params(DESCRIPTION, given_params)
    one_line(error)


def test_a_label_shows_the_swept_parameter_and_what_differs_from_the_default():
    spec = EntrySpec(DESCRIPTION, merge_params(DESCRIPTION, {"k": 1, "how": "global"}), None)
    assert spec.label == "topk(k=1, p=0.5, how='global')"


# --- the real child ---------------------------------------------------------------------------------------------------


def test_a_real_child_describes_what_is_an_entry_and_says_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(entries, "_described", {})
    shield = "from leakbench import Defense\n\nclass Shield(Defense):\n    pass\n"
    bad = {
        "missing.py": ("import nothing_of_that_name\n", "nothing_of_that_name"),
        "loud.py": ("print('x' * 5_000_000)\nraise ValueError('first\\nsecond')\n", "ValueError"),
        "typo.py": ("def :\n", "SyntaxError"),
        "empty.py": ("x = 1\n", "Attack"),
        "shield.py": (shield, "Attack"),
        "shield.py:Gone": (shield, "Gone"),
    }
    for name, (text, _) in bad.items():
        (tmp_path / name.split(":")[0]).write_text(text)
    merging = tmp_path / "merging.py"
    merging.write_text(shield.replace("pass", "merges = 3"))
    (description,) = entries.describe([find_source("defense", str(merging))])
    assert description.merges == 3
    refs = ["llg", *(str(tmp_path / name) for name in bad)]
    llg, *errors = entries.try_describe([find_source("attack", ref) for ref in refs])
    assert isinstance(llg, Description)
    assert llg.recovers == ("labels",)
    assert llg.reference
    for (name, (_, message)), error in zip(bad.items(), errors, strict=True):
        assert isinstance(error, UserError), name
        text = str(error)
        assert message in text
        assert str(tmp_path / name.split(":")[0]) in text
        assert "\n" not in text
        assert len(text) < 1000
