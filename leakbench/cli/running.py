"""Commands that measure: run, measure, reproduce."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from leakbench.cli.base import cli, print_json
from leakbench.errors import INTERRUPTED, UserError

if TYPE_CHECKING:
    from leakbench.runner.session import Report, Request
    from leakbench.utility.session import UtilityReport

R = TypeVar("R")

_RUN_OPTIONS = (
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
    click.option("--workers", type=int, help="Jobs at a time. [default: CPU cores, at most 8; 1 on a GPU]"),
    click.option("--out", type=click.Path(path_type=Path), help="Directory of the rows. [default: in runs/]"),
    click.option(
        "--isolation",
        type=click.Choice(["auto", "none", "process", "bwrap"]),
        default="auto",
        show_default=True,
        help="What separates entries from the truth; auto is bwrap where installed, else process.",
    ),
    click.option("--season-key", type=click.Path(path_type=Path), help="File with the secret key of a season."),
    click.option("--fresh", is_flag=True, help="Measure again what other leakbench code measured."),
    click.option("--keep", is_flag=True, help="Keep what other leakbench code measured."),
    click.option("--retry-failed", is_flag=True, help="Run again the jobs that failed or lacked data or weights."),
    click.option("--only-available", is_flag=True, help="Leave out the jobs whose data is not at hand."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)
"""What `run` and `reproduce` share."""


def _run_options(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


def _run(suite: str, out: Path | None, fresh: bool, keep: bool, **options: Any) -> Report | None:
    """Run a suite; None where the user stopped it."""
    from leakbench.runner.session import run_suite

    return _asked(run_suite, suite, out, fresh, keep, options)


def _asked(
    what: Callable[[Request], R], suite: str, out: Path | None, fresh: bool, keep: bool, options: dict[str, Any]
) -> R | None:
    """Do what the options ask for with a suite; None where the user stopped it."""
    if options.get("trials") is not None and options["trials"] < 1:
        raise UserError(f"--trials: expected at least 1, got {options['trials']}; try --trials 64")
    if options["workers"] is not None and options["workers"] < 1:
        raise UserError(f"--workers: expected at least 1, got {options['workers']}; try --workers 2")
    if fresh and keep:
        raise UserError("--fresh and --keep: expected one of them, got both")
    from leakbench.runner import session

    again = shlex.join(["leakbench", *sys.argv[1:]])
    other: Literal["fresh", "keep", "stop"] = "fresh" if fresh else "keep" if keep else "stop"
    try:
        return what(session.Request(suite=suite, out=out, other_code=other, command=again, **options))
    except KeyboardInterrupt:
        click.echo(session.interrupted(again), err=True)
        return None


def _reported(report: Report | UtilityReport | None, as_json: bool) -> int:
    """Print what a run did and return its exit code."""
    if report is None:
        return INTERRUPTED
    if as_json:
        print_json(report.content())
    else:
        click.echo(report.text())
    return 1 if report.failed else 0


@cli.command()
@click.argument("suite")
@click.option("--attack", "attacks", multiple=True, metavar="EXPR", help="Instead of the suite's attacks; repeatable.")
@click.option("--defense", "defenses", multiple=True, metavar="EXPR", help="Instead of its defenses; repeatable.")
@click.option("--trials", type=int, help="Instead of the suite's number of trials.")
@click.option(
    "--in-training",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Also attack the updates that leakbench utility kept in OUT.",
)
@click.option("--shard", metavar="I/N", help="Do only the I-th of N parts of the jobs.")
@_run_options
def run(suite: str, shard: str | None, as_json: bool, **options: Any) -> int:
    """Run SUITE (a name or a YAML file) and write one row per trial.

    Running the same command again resumes it. EXPR is NAME, NAME(key=value) or path/to/file.py:Class; a chain of
    defenses is joined by +. What leakbench utility kept is attacked as the suite attacks the same dataset and defense,
    in rows of stage in_training.
    """
    from leakbench.runner.plan import parse_shard

    return _reported(_run(suite, shard=parse_shard(shard or "1/1"), **options), as_json)


@cli.command()
@click.argument("suite")
@click.option(
    "--measure", "measures", multiple=True, metavar="EXPR", help="Instead of the suite's measures; repeatable."
)
@click.option("--defense", "defenses", multiple=True, metavar="EXPR", help="Instead of its defenses; repeatable.")
@click.option("--trials", type=int, help="Instead of the suite's number of trials.")
@click.option("--shard", metavar="I/N", help="Do only the I-th of N parts of the jobs.")
@_run_options
def measure(suite: str, shard: str | None, as_json: bool, **options: Any) -> int:
    """Measure how much leaks on the tasks of SUITE, from which layer, and write one row per layer and number.

    Running the same command again resumes it. The rows go to the folder measures of the output directory, so that
    `leakbench board OUT --measures` finds those of attacks beside them. EXPR is NAME or NAME(key=value); see
    `leakbench list measures`.
    """
    from leakbench.runner.plan import parse_shard

    return _reported(_run(suite, shard=parse_shard(shard or "1/1"), measuring=True, **options), as_json)


@cli.command()
@click.argument("suite")
@click.option("--defense", "defenses", multiple=True, metavar="EXPR", help="Instead of the suite's; repeatable.")
@_run_options
def utility(suite: str, out: Path | None, fresh: bool, keep: bool, as_json: bool, **options: Any) -> int:
    """Train federations with the defenses of SUITE from scratch and say what each costs.

    In accuracy, rounds, client time and upload. Every defense has the same rounds, seeds and learning rates to choose
    from; the undefended client is always among them. A training that fails or diverges is of no use, and has a row.
    The rows go to the folder utility of the output directory, beside those of attacks. Running the same command again
    resumes it.
    """
    from leakbench.utility.session import run_utility

    return _reported(_asked(run_utility, suite, out, fresh, keep, options), as_json)


@cli.command()
@click.argument("paper", metavar="PAPER|ROW_ID")
@click.option("--quick", is_flag=True, help="Only the cells, and as many trials, as the reference file calls quick.")
@click.option(
    "--rows",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Of a row: where it is; repeatable. [default: runs and results]",
)
@click.option("--entry", "entries", multiple=True, metavar="FILE:CLASS", help="Of a row: an entry run from a file.")
@_run_options
def reproduce(
    paper: str, quick: bool, folders: tuple[Path, ...], entries: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Run the suite of PAPER (breaking_sa, dlm, ilrg, llg, localization) and print its figures or claims beside ours.

    With a ROW_ID (the hexadecimal job id of a row, and :TRIAL for one trial; see `leakbench rows`), run exactly that
    job again and print the differences with their tolerance; exits with 1 where one is greater.

    Also writes the table to the directory of the rows. Running the same command again resumes it, and rows of
    `leakbench run PAPER` (and `leakbench measure PAPER`) in that directory count.
    """
    from leakbench.submitting.rerun import is_row_id

    if is_row_id(paper):
        from leakbench.cli.submitting import reproduce_row

        return reproduce_row(paper, folders, entries, as_json, options)
    from leakbench import reproduce as reproduction
    from leakbench.board.reproduction import print_claims, print_table, to_json

    references = reproduction.load_references(paper)
    out: Path = options.pop("out") or Path("runs") / (f"{paper}-quick" if quick else paper)
    if quick:
        options |= {"trials": references.quick_trials, "keep_cell": lambda c: reproduction.is_quick(c, references)}
    reports = []
    for measuring in (False, True) if references.claims else (False,):
        report = _run(paper, out=out, measuring=measuring, **options)
        if report is None:
            return INTERRUPTED
        reports.append(report)
    if references.claims:
        found = reproduction.judge(out, references)
        paths = found.paths
        text = found.paths[1].read_text(encoding="utf-8")
    else:
        table, paths = reproduction.tabulate(out, references, whole=not quick)
        text = to_json(table)
    if as_json:
        click.echo(text.rstrip("\n"))
    else:
        if references.claims:
            print_claims(found.summary, found.table)
        else:
            print_table(table, references)
        for report in reports:
            click.echo(report.text())
        click.echo(f"table: {', '.join(map(str, paths))}")
    return 1 if any(report.failed for report in reports) else 0
