"""Commands for those who bring an attack or a defense, and for those who check what was brought."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from leakbench.cli.base import cli, print_json, runs_below
from leakbench.errors import unknown

_MARKS = {"ok": ("ok", "green"), "failed": ("failed", "red"), "todo": ("to do", "yellow"), "skipped": ("skipped", None)}


@cli.command()
@click.argument("kind", type=click.Choice(["attack", "defense"]))
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="File to write. [default: NAME.py]")
@click.option("--recovers", type=click.Choice(["labels", "inputs"]), default="labels", help="What an attack recovers.")
def new(kind: Literal["attack", "defense"], name: str, out: Path | None, recovers: Literal["labels", "inputs"]) -> None:
    """Write a working attack or defense called NAME to start from."""
    from leakbench.submitting.skeletons import new_entry

    path = new_entry(kind, name, out, recovers=recovers)
    click.echo(f"{path}\nnext: leakbench check {path}")


@cli.command()
@click.argument("file")
@click.option("--isolation", type=click.Choice(["auto", "process", "bwrap"]), default="auto", show_default=True)
@click.option("--strict", is_flag=True, help="Exit with 1 where something is left to do, too: ready to submit?")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def check(file: str, isolation: str, strict: bool, as_json: bool) -> int:
    """Try in seconds whether the entry in FILE (or FILE:CLASS) keeps the contract, and say what to do where not.

    Its code runs in a child process only. Exits with 1 where a law is broken.
    """
    from leakbench.submitting.check import Finding, check

    def show(finding: Finding) -> None:
        mark, color = _MARKS[finding.state]
        text = f"{click.style(f'{mark:<8}', fg=color)}{finding.law}"
        click.echo(f"{text}: {finding.text}" if finding.text else text)

    verdict = check(file, isolation=isolation, **({} if as_json else {"on_finding": show}))
    passed = verdict.passed(strict=strict)
    if as_json:
        print_json(verdict.content())
    elif verdict.passed():
        left = sum(finding.state == "todo" for finding in verdict.findings)
        click.echo(f"passed; {left} to do before it is submitted" if left else "passed; ready to submit")
        click.echo(f"next: leakbench evaluate {file} --suite quick")
    else:
        click.echo(f"failed; correct what is said above and type again: leakbench check {file}")
    return 0 if passed else 1


@cli.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--entry", "entries", multiple=True, metavar="FILE:CLASS", help="An entry that was run from a file.")
@click.option("--signers", type=click.Path(path_type=Path), help="Allowed signers, as ssh-keygen has them.")
@click.option("--seal", is_flag=True, help="Write SHA256SUMS over each of RESULTS where nothing is refused.")
@click.option("--strict", is_flag=True, help="Refuse notes, too.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(
    results: tuple[Path, ...],
    entries: tuple[str, ...],
    signers: Path | None,
    seal: bool,
    strict: bool,
    as_json: bool,
) -> int:
    """Check the rows under RESULTS: schema, versions, hashes, duplicates, seal and signature.

    Exits with 1 where a row is refused. A number itself is compared with checksums only; whether it is right is what
    `leakbench reproduce ROW_ID` shows.
    """
    from leakbench.submitting.seal import write_seal
    from leakbench.submitting.verify import content, summary, verify

    found = verify(results, entries=entries, signers=signers, seals=not seal)
    bad = bool(found.problems or (strict and found.notes))
    if as_json:
        print_json(content(found))
    else:
        click.echo("\n".join(summary(found)))
    if seal and not bad:
        for folder in results:
            click.echo(write_seal(folder), err=as_json)
    return 1 if bad else 0


def reproduce_row(
    row_id: str, folders: tuple[Path, ...], entries: tuple[str, ...], as_json: bool, options: Mapping[str, Any]
) -> int:
    """Run one row's job again; the part of `leakbench reproduce` that takes a row id."""
    from leakbench.keys import DEVELOPMENT, Season
    from leakbench.submitting.rerun import rerun, text

    key = options["season_key"]
    found = rerun(
        row_id,
        folders or tuple(folder for folder in (Path("runs"), Path("results")) if folder.is_dir()),
        entries=entries,
        season=DEVELOPMENT if key is None else Season.from_file(key),
        isolation=options["isolation"],
        device=options["device"],
    )
    if as_json:
        print_json(found.content())
    else:
        click.echo("\n".join(text(found)))
    return 0 if found.agrees else 1


@cli.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--attack", metavar="A", help="Only this attack.")
@click.option("--defense", metavar="D", help="Only this defense; none for none.")
@click.option("--task", metavar="T", help="Only tasks with this in their id.")
def rows(results: tuple[Path, ...], attack: str | None, defense: str | None, task: str | None) -> None:
    """List the rows under RESULTS by the id that `leakbench reproduce` takes, with the metric that boards rank by."""
    from leakbench.metrics import headline
    from leakbench.results import load_rows

    table = load_rows(runs_below(results))
    for column, wanted in (("attack", attack), ("defense", defense), ("task", task)):
        if wanted is not None:
            held = sorted(set(table[column].dropna()))
            is_it = table["task"].str.contains(wanted, regex=False) if column == "task" else table[column] == wanted
            if not is_it.any():
                raise unknown(f"{column} in these rows", wanted, held)
            table = table[is_it]
    for row in table.sort_values(["task", "defense_label", "attack_label", "trial"]).to_dict("records"):
        spec = headline(row["target"])
        number = f"{spec.name} {row[spec.name]:.4g}" if row["status"] == "ok" else row["status"]
        cell = f"{row['task']} / {row['attack_label']} / {row['defense_label']}"
        click.echo(f"{row['job_id'][:16]}:{row['trial']}  {cell}  {number}")


@cli.command()
@click.argument("then", type=click.Path(path_type=Path))
@click.argument("now", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def drift(then: Path, now: Path, as_json: bool) -> int:
    """Compare the rows under THEN with those that the same jobs gave later, under NOW.

    Exits with 1 where a number differs: rows are equal bit by bit on the same kind of machine, threads, torch and code,
    else within the tolerance of `leakbench reproduce`.
    """
    from leakbench.submitting.drift import drift

    found = drift([then], [now])
    if as_json:
        print_json(found.content())
    else:
        click.echo("\n".join(found.lines()))
    return 1 if found.off else 0


@cli.command()
@click.argument("base")
@click.argument("head")
@click.option("--actor", default="", help="Login of who opened the pull request, from the event.")
@click.option("--place", is_flag=True, help="Write the one entry file of HEAD into this checkout of BASE.")
@click.option("--github-output", type=click.Path(path_type=Path), help="Append kind, entry and name for later steps.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def guard(base: str, head: str, actor: str, place: bool, github_output: Path | None, as_json: bool) -> int:
    """Say what the change from commit BASE to HEAD is: a submission, rows, or a change of leakbench itself.

    The change is what merging HEAD into BASE does. A submission adds one entry file and its test data, and nothing
    else; a revision changes an entry that is there and raises its version. Rows come from the scoring identity
    (.github/scorers.txt of BASE) and come alone. Exits with 1 where a change is refused. Nothing of HEAD is run or
    checked out.
    """
    from leakbench.submitting.guard import guard, place_entry

    found = guard(Path.cwd(), base, head, actor=actor)
    if as_json:
        print_json(found.content())
    else:
        click.echo("\n".join(found.lines()))
    if github_output is not None:
        with github_output.open("a", encoding="utf-8") as file:
            file.write(f"kind={found.kind}\nentry={found.entry or ''}\nname={found.name or ''}\n")
    if place and not found.problems:
        click.echo(place_entry(Path.cwd(), found), err=as_json)
    return 1 if found.problems else 0


@cli.command()
@click.argument("file")
@click.option("--suite", required=True, help="Suite by name, or a YAML file.")
@click.option("--trials", type=click.IntRange(min=1), help="Instead of the suite's number of trials.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Rows of the baselines; repeatable. [default: they are run now]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the rows. [default: runs/SUITE-with-NAME]")
@click.option("--isolation", type=click.Choice(["auto", "process", "bwrap"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), help="Jobs at a time.")
@click.option("--only-available", is_flag=True, help="Leave out the jobs whose data is not at hand.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def evaluate(file: str, suite: str, as_json: bool, **options: Any) -> int:
    """Run the entry in FILE on a suite and say where it would rank among the baselines.

    Its rows are claimed, not official. Exits with 1 where one of its jobs failed.
    """
    from leakbench.submitting.evaluate import evaluate_file, text

    found = evaluate_file(file, suite, **options)
    if as_json:
        print_json(found.content())
    else:
        click.echo("\n".join(text(found)))
        click.echo(f"rows: {found.out}")
    return 1 if found.failed else 0
