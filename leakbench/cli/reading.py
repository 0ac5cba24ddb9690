"""Commands that read what was measured: status, board, gallery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from leakbench.cli.base import cli, print_json, runs_below
from leakbench.errors import UserError


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(out: Path, as_json: bool) -> None:
    """Say how many jobs of the last plan in OUT are done, failed and left."""
    from leakbench.runner.session import status_of

    state = status_of(out)
    if as_json:
        print_json(state)
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
@click.option(
    "--into", type=click.Path(path_type=Path), help="Markdown file whose marked part becomes the best of every lane."
)
@click.option("--lanes", "only_lanes", is_flag=True, help="Only the lanes: each attack's mean over their tasks.")
@click.option("--measures", is_flag=True, help="What was measured without or beside attacks, layer by layer.")
@click.option("--defenses", is_flag=True, help="What defenses leave of the leakage, at what accuracy; and AutoLeak.")
@click.option(
    "--table",
    metavar="T",
    help="Of measures: lower_bound, proxy, proved_bound, correlations or missing; of defenses: ranking, settings, "
    "tasks, autoleak, members or overlap.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="SVG or PNG file for a picture of measures along the layers. [default beside printed tables: OUT/profile.svg]",
)
@click.option("--pareto", type=click.Path(path_type=Path), help="SVG or PNG file for a picture of defenses.")
def board(
    out: tuple[Path, ...],
    form: str | None,
    into: Path | None,
    only_lanes: bool,
    measures: bool,
    defenses: bool,
    table: str | None,
    profile: Path | None,
    pareto: Path | None,
) -> int:
    """Print the board of the rows in OUT, or in several of them: lanes, then each cell's mean, interval and chance.

    An OUT is the folder of a run, or a folder of such folders.

    With --measures, what `leakbench measure` found: lower bounds, proxies and proved bounds in tables of their own, and
    whether proxies tell how well attacks do. Exits with 1 where an attack exceeds a proved bound.

    With --defenses, how private each defense is under the worst attack, beside the accuracy that it costs where
    `leakbench utility` trained with it, and what AutoLeak found.
    """
    out = runs_below(out)
    if defenses or pareto is not None:
        if only_lanes or measures or profile is not None:
            raise UserError("--defenses: expected the board of defenses, got another board too; leave one out")
        from leakbench.board.defense_view import show as show_defenses

        show_defenses(out, form, table, pareto)
        return 0
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
    if into is not None:
        from leakbench.board.readme import best_of_lanes, write_into

        write_into(into, "board", best_of_lanes(lanes(rows)))
        click.echo(into)
        return 0
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
        print_json([{k: v for k, v in e.items() if not isinstance(v, bytes)} for cell in cells for e in cell])
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
