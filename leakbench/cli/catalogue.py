"""Commands that show what there is: list, show, schema, lock, epsilon."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby
from typing import Any

import click

from leakbench.cli.base import cli, print_json
from leakbench.errors import unknown

KINDS = ("attacks", "defenses", "datasets", "architectures", "suites", "metrics", "measures")
"""What can be listed."""

NEUTRAL = {"merges": 1, "exact": False}
"""Values that say nothing of an entry."""


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
        print_json(items)
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
        print_json([{"kind": kind, **item} for kind, item in found])
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
@click.option("--utility", is_flag=True, help="Of the rows of `leakbench utility` instead.")
def schema(measures: bool, utility: bool) -> None:
    """Print every column of a result row as a Markdown table."""
    from leakbench.measures.rows import MEASURE_FIELDS
    from leakbench.results import ROW_FIELDS, schema_markdown
    from leakbench.utility.rows import UTILITY_FIELDS

    click.echo(schema_markdown(UTILITY_FIELDS if utility else MEASURE_FIELDS if measures else ROW_FIELDS))


@cli.command()
@click.argument("suite")
@click.option("--definition-only", is_flag=True, help="Pin no checkpoints: the suite's datasets are not at hand.")
def lock(suite: str, definition_only: bool) -> None:
    """Make the definition and trained checkpoints of SUITE official in tasks.lock: for maintainers, in a checkout."""
    from leakbench.lock import lock_suite, tasks_folder
    from leakbench.suites import load_suite

    for path in lock_suite(load_suite(suite), tasks_folder(), checkpoints=not definition_only):
        click.echo(path)


@cli.command()
@click.option("--noise-multiplier", type=float, required=True, help="Noise on the sum, in units of the clip.")
@click.option("--sample-rate", type=float, default=1.0, show_default=True, help="Share of the examples in a step.")
@click.option("--steps", type=int, default=1, show_default=True, help="Noisy steps, of all rounds.")
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option("--accountant", default="prv", show_default=True, help="Of Opacus: prv, rdp or gdp.")
def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: Any) -> None:
    """Print the epsilon of DP-SGD: as usually told, and of an example that is in every step's batch."""
    from leakbench.accounting import account, gdp_epsilon

    usual, used = account(noise_multiplier, sample_rate, steps, delta, accountant)
    by = "closed form" if used == "exact" else f"{used} accountant"
    why = " (out of prv's reach)" if (used, accountant) == ("rdp", "prv") else ""
    every = gdp_epsilon(2 * steps**0.5 / noise_multiplier, delta)
    click.echo(f"{usual:.4g}  one example added or removed, Poisson sampling, {by}{why}")
    click.echo(f"{every:.4g}  one example replaced, in every step's batch: dp_sgd's clients here")
