"""Bad input through the command line: one clear line, exit code 2 or rows with a status, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from leakbench import cli
from leakbench.results import load_rows

SUITE = """
name: small
version: 1
description: a test
trials: 4
trials_per_job: 2
budget: {wall_seconds: 20}
grids:
  - dataset: DATASET
    architecture: mlp
    batch: {size: SIZE}
    attacks: random_labels
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One describe cache for the module, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def leakbench(tmp_path, monkeypatch, capfd):
    """Run a command line in an empty directory; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        return end.value.code, *capfd.readouterr()

    return call


def suite(folder, *, dataset="digits", size=4):
    path = folder / "small.yaml"
    path.write_text(SUITE.replace("DATASET", dataset).replace("SIZE", str(size)))
    return path


def refused(answer, *messages):
    code, out, err = answer
    assert code == 2
    assert out == ""
    first, *more = err.splitlines()
    (error,) = more if "rows go to" in first else [first]
    assert error.startswith("error: ")
    for message in messages:
        assert message in error


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_its_split_is_refused(leakbench, tmp_path):
    path = suite(tmp_path, size=5000)
    refused(leakbench("run", path, "--isolation", "none"), "at most", "5000")
    assert not list(tmp_path.glob("runs/small/*/*/*.parquet"))


def test_a_dataset_missing_under_leakbench_data_is_refused(leakbench, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    refused(leakbench("run", suite(tmp_path, dataset="mnist"), "--isolation", "none"), "ylecun/mnist", str(tmp_path))


def test_a_truncated_parquet_under_leakbench_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "ylecun" / "mnist" / "mnist"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    # A process of its own: the library that reads it would otherwise keep the log level of earlier tests.
    command = [sys.executable, "-c", "from leakbench.cli import main; main()", "run", suite(tmp_path, dataset="mnist")]
    done = subprocess.run([*command, "--isolation", "none"], capture_output=True, text=True, cwd=tmp_path)
    refused((done.returncode, done.stdout, done.stderr), "-00000-of-00001.parquet")


def test_an_npz_without_labels_is_refused(leakbench, tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.zeros((30, 8, 8), np.uint8))
    refused(leakbench("run", suite(tmp_path, dataset="mine.npz"), "--isolation", "none"), "mine.npz")


def test_a_net_that_cannot_take_the_images_is_refused(leakbench, tmp_path):
    path = suite(tmp_path)
    path.write_text(path.read_text().replace("mlp", "lenet5"))
    refused(leakbench("run", path, "--isolation", "none"), "lenet5")


# --- the output directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_refused(leakbench, tmp_path, out):
    (tmp_path / "file").write_text("not a directory")
    refused(leakbench("run", suite(tmp_path), "--out", out), f"--out {out}", "use another --out")
    assert (tmp_path / "file").read_text() == "not a directory"


# --- entries ----------------------------------------------------------------------------------------------------------

HEADER = """
import torch
from leakbench import Attack, Defense, Recovery, register
"""

ATTACK = """
@register("NAME")
class Bad(Attack):
    recovers = frozenset({"labels"})
    reads = ("head.weight",)

    def run(self, observation):
        counts = torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.long)
        BODY
"""

DEFENSE = """
@register("NAME")
class Bad(Defense):
    acts_on = frozenset({"update"})

    def update(self, update, ctx):
        BODY
"""

ATTACKS = {
    "raises": ("raise ValueError('this failed')", "error"),
    "prints_megabytes": ("print('x' * 9_000_000); return Recovery(label_counts=counts)", "ok"),
    "wrong_type": ("return counts", "invalid"),
    "wrong_shape": ("return Recovery(label_counts=counts[:, 0])", "invalid"),
    "wrong_dtype": ("return Recovery(label_counts=counts.float())", "invalid"),
    "wrong_device": ("return Recovery(label_counts=counts.to('meta'))", "invalid"),
    "changes_its_input": ("observation.update['x'] = counts; return Recovery(label_counts=counts)", None),
}
DEFENSES = {
    "fails": ("raise ValueError('this failed')", "error"),
    "other_names": ("return {n + '2': v for n, v in update.items()}", "invalid"),
    "other_shapes": ("return {n: v[..., :1] for n, v in update.items()}", "invalid"),
    "other_dtype": ("return {n: v.double() for n, v in update.items()}", "invalid"),
}


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory):
    """Run every bad attack undefended, and a good attack against every bad defense: folder and exit code."""
    folder = tmp_path_factory.mktemp("bad")
    for template, entries in ((ATTACK, ATTACKS), (DEFENSE, DEFENSES)):
        for name, (body, _) in entries.items():
            text = HEADER + template.replace("NAME", name).replace("BODY", body)
            (folder / f"{name}.py").write_text(text)
    grids = [
        {"attacks": [f"{folder}/{name}.py" for name in ATTACKS]},
        {"attacks": ["llg"], "defenses": [f"{folder}/{name}.py:Bad" for name in DEFENSES]},
    ]
    content = {
        "name": "bad",
        "version": 1,
        "description": "d",
        "trials": 2,
        "budget": {"wall_seconds": 10},
        "grids": [{"dataset": "digits", "architecture": "mlp", "batch": 4, **grid} for grid in grids],
    }
    (folder / "bad.yaml").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        cli.main(["run", str(folder / "bad.yaml"), "--out", str(folder / "out"), "--workers", "1"])
    return folder, end.value.code


@pytest.mark.parametrize("name", [*ATTACKS, *DEFENSES])
def test_a_bad_entry_gives_rows_with_its_status_and_one_line(bad_run, name):
    rows = load_rows(bad_run[0] / "out")
    mine = rows[rows["attack" if name in ATTACKS else "defense"] == name]
    assert len(mine) == 2, "every planned trial has its row"
    expected = (ATTACKS | DEFENSES)[name][1]
    if expected is not None:
        assert set(mine["status"]) == {expected}, mine["error"].iloc[0]
    if set(mine["status"]) != {"ok"}:
        (text,) = set(mine["error"])
        assert "\n" not in text
        assert len(text) < 1000
        assert mine["instance_recall"].isna().all()


def test_a_run_with_failures_exits_1_and_does_every_job(bad_run):
    folder, code = bad_run
    assert code == 1
    assert load_rows(folder / "out")["job_id"].nunique() == len(ATTACKS) + len(DEFENSES)


def test_status_and_board_read_real_rows_without_torch(bad_run):
    code = (
        "import sys, leakbench.cli as c\n"
        "for line in sys.argv[2:]:\n"
        "    try: c.main([*line.split(), sys.argv[1]])\n"
        "    except SystemExit as e: print('\\nend', e.code, 'torch' in sys.modules)"
    )
    lines = ["status", "board", "board --json", "board --csv", "board --markdown"]
    command = [sys.executable, "-c", code, str(bad_run[0] / "out"), *lines]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in text.splitlines() if line.startswith("end ")] == ["end 0 False"] * len(lines)
    assert text.count("wrong_shape") >= len(lines)


def test_rows_of_another_schema_version_are_refused_and_kept(bad_run, leakbench, tmp_path):
    folder, _ = bad_run
    shutil.copytree(folder / "out", tmp_path / "old")
    for path in Path(tmp_path / "old").glob("*/*/*.parquet"):
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"leakbench.schema_version": b"0"}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    before = {path: path.read_bytes() for path in Path(tmp_path / "old").rglob("*.parquet")}
    for command in (["run", folder / "bad.yaml", "--out", "old"], ["board", "old"], ["status", "old"]):
        refused(leakbench(*command), "schema version", "got 0", "another --out")
    assert {path: path.read_bytes() for path in Path(tmp_path / "old").rglob("*.parquet")} == before


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("attack", "import nothing_of_that_name", "nothing_of_that_name"),
        ("defense", "raise OSError('a\\nb')", "OSError"),
    ],
)
def test_an_entry_file_that_does_not_import_is_refused(leakbench, tmp_path, option, text, message):
    (tmp_path / "bad_file.py").write_text(text)
    refused(leakbench("run", suite(tmp_path), f"--{option}", "bad_file.py"), f"{option} file", "bad_file.py", message)
    assert not (tmp_path / "runs").exists()
