"""Commands for those who bring an attack or a defense, and for those who check what was brought."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from leakbench.cli.base import cli, print_json

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
