"""The command line: parse, call, print. Everything beyond click is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from leakbench.errors import INTERRUPTED, LeakbenchError, UserError, unknown

if TYPE_CHECKING:
    from leakbench.runner.session import Report

KINDS = ("attacks", "defenses", "datasets", "architectures", "suites", "metrics", "measures")
"""What can be listed."""

NEUTRAL = {"merges": 1, "exact": False}
"""Values that say nothing of an entry."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a job failed, 2 a mistake of the user, 130 interrupted."""
    # Hugging Face logs what leakbench's own one-line errors say already.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    try:
        sys.exit(cli.main(args=argv, prog_name="leakbench", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        hint = f" See: {error.ctx.command_path} --help" if error.ctx is not None else ""
        _fail(error.format_message() + hint)
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        sys.exit(INTERRUPTED)
    except LeakbenchError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="leakbench")
def cli() -> None:
    """Benchmark of gradient and model leakage in federated learning."""


# --- run --------------------------------------------------------------------------------------------------------------


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
        return session.run_suite(session.Request(suite=suite, out=out, other_code=other, command=again, **options))
    except KeyboardInterrupt:
        click.echo(session.interrupted(again), err=True)
        return None


def _reported(report: Report | None, as_json: bool) -> int:
    """Print what a run did and return its exit code."""
    if report is None:
        return INTERRUPTED
    if as_json:
        _print_json(report.content())
    else:
        click.echo(report.text())
    return 1 if report.failed else 0


@cli.command()
@click.argument("suite")
@click.option("--attack", "attacks", multiple=True, metavar="EXPR", help="Instead of the suite's attacks; repeatable.")
@click.option("--defense", "defenses", multiple=True, metavar="EXPR", help="Instead of its defenses; repeatable.")
@click.option("--trials", type=int, help="Instead of the suite's number of trials.")
@click.option("--shard", metavar="I/N", help="Do only the I-th of N parts of the jobs.")
@_run_options
def run(suite: str, shard: str | None, as_json: bool, **options: Any) -> int:
    """Run SUITE (a name or a YAML file) and write one row per trial.

    Running the same command again resumes it. EXPR is NAME, NAME(key=value) or path/to/file.py:Class; a chain of
    defenses is joined by +.
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
@click.argument("paper")
@click.option("--quick", is_flag=True, help="Only the cells, and as many trials, as the reference file calls quick.")
@_run_options
def reproduce(paper: str, quick: bool, as_json: bool, **options: Any) -> int:
    """Run the suite of PAPER (breaking_sa, dlm, ilrg, llg, localization) and print its figures or claims beside ours.

    Also writes the table to the directory of the rows. Running the same command again resumes it, and rows of
    `leakbench run PAPER` (and `leakbench measure PAPER`) in that directory count.
    """
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


# --- what there is ----------------------------------------------------------------------------------------------------


@cli.command("list")
@click.argument("kind", metavar="|".join(KINDS))
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def list_(kind: Any, as_json: bool) -> None:
    """List everything of one kind."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    from leakbench.listing import list_items

    items = list_items(kind)
    if as_json:
        _print_json(items)
        return
    width = max((len(item["name"]) for item in items), default=0)
    for item in items:
        click.echo(f"{item['name']:<{width}}  {item.get('error') or item['summary']}")


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print every field as JSON.")
def show(name: str, as_json: bool) -> None:
    """Show an attack, defense, dataset, architecture, suite or metric in full; also file.py:Class and suite files."""
    from leakbench.listing import show_items

    found = show_items(name)
    if as_json:
        _print_json([{"kind": kind, **item} for kind, item in found])
        return
    for kind, item in found:
        click.echo(f"{kind} {item['name']}: {item['summary']}")
        for key, value in item.items():
            if key == "tasks":
                _show_tasks(value)
            elif key not in ("name", "kind", "summary", "doc") and value not in (None, [], {}, "", NEUTRAL.get(key)):
                click.echo(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")
        if item.get("doc"):
            click.echo("\n" + textwrap.indent(item["doc"].partition("\n")[2].strip("\n"), "  "))


MOST_TASKS = 20
"""Most tasks of a suite that `show` prints."""


def _show_tasks(tasks: list[dict[str, Any]]) -> None:
    for task in tasks[:MOST_TASKS]:
        click.echo(f"  {task['task']}  {task['hash'][:12]}  lane: {task['lane'] or 'none'}")
        for attack, cells in groupby(task["cells"], key=lambda cell: cell["attack"]):
            rows = list(cells)
            against = ", ".join(cell["defense"] for cell in rows)
            click.echo(
                f"    {attack} vs {against}: {rows[0]['trials']} trials each, model_draws {rows[0]['model_draws']}"
            )
    if len(tasks) > MOST_TASKS:
        click.echo(f"  and {len(tasks) - MOST_TASKS} tasks more: --json")


@cli.command()
@click.option("--measures", is_flag=True, help="Of the rows of `leakbench measure` instead.")
def schema(measures: bool) -> None:
    """Print every column of a result row as a Markdown table."""
    from leakbench.measures.rows import MEASURE_FIELDS
    from leakbench.results import ROW_FIELDS, schema_markdown

    click.echo(schema_markdown(MEASURE_FIELDS if measures else ROW_FIELDS))


@cli.command()
@click.argument("suite")
@click.option("--definition-only", is_flag=True, help="Pin no checkpoints: the suite's datasets are not at hand.")
def lock(suite: str, definition_only: bool) -> None:
    """Make the definition and trained checkpoints of SUITE official in tasks.lock: for maintainers, in a checkout."""
    from leakbench.lock import lock_suite, tasks_folder
    from leakbench.suites import load_suite

    for path in lock_suite(load_suite(suite), tasks_folder(), checkpoints=not definition_only):
        click.echo(path)


# --- what was measured ------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(out: Path, as_json: bool) -> None:
    """Say how many jobs of the last plan in OUT are done, failed and left."""
    from leakbench.runner.session import status_of

    state = status_of(out)
    if as_json:
        _print_json(state)
        return
    jobs = state["jobs"]
    click.echo(f"{out}: {jobs['done']} of {jobs['planned']} jobs done, {jobs['failed']} failed, {jobs['left']} left")
    for name, count in state["trials"].items():
        click.echo(f"  {count} trials {name}")
    for label in state["failed"]:
        click.echo(f"  failed: {label}")
    if jobs["left"]:
        click.echo(f"resume with: {state['command']}")


@cli.command()
@click.argument("out", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--json", "form", flag_value="json", help="Every column of every cell as JSON.")
@click.option("--markdown", "form", flag_value="markdown", help="Tables as Markdown.")
@click.option("--csv", "form", flag_value="csv", help="Every column of every cell as CSV.")
@click.option("--lanes", "only_lanes", is_flag=True, help="Only the lanes: each attack's mean over their tasks.")
@click.option("--measures", is_flag=True, help="What was measured without or beside attacks, layer by layer.")
@click.option("--table", metavar="T", help="Of measures: lower_bound, proxy, proved_bound, correlations or missing.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="SVG or PNG file for a picture of measures along the layers. [default beside printed tables: OUT/profile.svg]",
)
def board(
    out: tuple[Path, ...], form: str | None, only_lanes: bool, measures: bool, table: str | None, profile: Path | None
) -> int:
    """Print the board of the rows in OUT, or in several of them: lanes, then each cell's mean, interval and chance.

    With --measures, what `leakbench measure` found: lower bounds, proxies and proved bounds in tables of their own, and
    whether proxies tell how well attacks do. Exits with 1 where an attack exceeds a proved bound.
    """
    if measures or table is not None or profile is not None:
        if only_lanes:
            raise UserError("--lanes: expected the board of attacks, got measures too; leave one out")
        from leakbench.board.view import show

        return _exceeded(show(out, form, table, profile))
    from leakbench.board import render
    from leakbench.board.lanes import lanes
    from leakbench.board.score import cells
    from leakbench.results import holds_measures, load_rows

    rows = load_rows(out)
    board, ranked = cells(rows.iloc[:0] if only_lanes else rows), lanes(rows)
    if form is None:
        render.terminal(board, ranked)
    elif form == "csv":
        click.echo(render.to_csv(ranked if only_lanes else board).rstrip("\n"))
    else:
        text = {"json": render.to_json, "markdown": render.markdown}[form](board, ranked)
        click.echo(text.rstrip("\n"))
    if not any(map(holds_measures, out)):
        return 0
    from leakbench.board.view import exceeded

    return _exceeded(exceeded(out))


def _exceeded(violations: Sequence[object]) -> int:
    for violation in violations:
        click.secho(f"proved bound exceeded: {violation}", fg="red", bold=True, err=True)
    if violations:
        click.echo("the proof, the defense's declaration or leakbench is wrong: please report it", err=True)
    return 1 if violations else 0


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--attack", metavar="A", help="Only this attack, by name or label.")
@click.option("--task", metavar="T", help="Only this task.")
@click.option("--to", type=click.Path(path_type=Path), help="PNG file to write. [default: OUT/gallery.png]")
@click.option("--json", "as_json", is_flag=True, help="List the pictures as JSON instead.")
def gallery(out: Path, attack: str | None, task: str | None, to: Path | None, as_json: bool) -> None:
    """Draw what attacks recovered in OUT: of every cell the trials of best, median and worst PSNR."""
    from leakbench.gallery import read_gallery

    if to is not None and to.suffix.lower() != ".png":
        raise UserError(f"--to {to}: expected a PNG file, got {to.suffix or 'no suffix'}; write --to gallery.png")
    cells = read_gallery(out, attack=attack, task=task)
    if as_json:
        _print_json([{k: v for k, v in e.items() if not isinstance(v, bytes)} for cell in cells for e in cell])
        return
    from leakbench.board.sheet import MOST_LINES, contact_sheet

    to = to or out / "gallery.png"
    try:
        contact_sheet(cells[:MOST_LINES], str(out)).save(to, "PNG")
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror}); use another --to") from None
    click.echo(to)
    if len(cells) > MOST_LINES:
        click.echo(f"{len(cells) - MOST_LINES} of {len(cells)} cells are left out; choose with --attack or --task")
