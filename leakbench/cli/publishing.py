"""Commands that publish what was measured: compacted rows, how they were made, the site."""

from __future__ import annotations

from pathlib import Path

import click

from leakbench.cli.base import cli, print_json, runs_below


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write, such as results/quick.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def compact(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write the rows of RUNS as one Parquet file per kind, beside their pictures and reports.

    Every command that reads a run reads the result. Several RUNS, such as the shards of one, become one.
    """
    from leakbench.compact import compact

    done = compact(runs, out)
    if as_json:
        print_json(vars(done))
        return
    for kind, jobs in done.jobs.items():
        click.echo(f"{kind}: {done.rows[kind]:,} rows of {jobs:,} jobs")
    click.echo(f"pictures: {done.pictures}\n{out}: {done.bytes / 1e6:.1f} MB\nnext: leakbench verify {out} --seal")


@cli.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--into", type=click.Path(path_type=Path), help="Markdown file whose marked part becomes what is printed."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def provenance(results: tuple[Path, ...], into: Path | None, as_json: bool) -> None:
    """Say how the rows under RESULTS were made: command, hardware, data, how long it took."""
    from leakbench.board.origins import markdown, origins
    from leakbench.board.readme import write_into

    lines = origins(runs_below(results))
    if into is not None:
        write_into(into, "provenance", markdown(lines))
        click.echo(into)
    elif as_json:
        print_json(lines.to_dict("records"))
    else:
        click.echo(markdown(lines))


@cli.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder to write."
)
@click.option("--repository", metavar="URL", help="Address of the code, https://..., that pages of entries link to.")
@click.option("--changelog", type=click.Path(path_type=Path), help="Version history. [default: that of a checkout]")
@click.option("--again", type=click.Path(path_type=Path), help="Rows of the same jobs that another machine made.")
@click.option(
    "--signers",
    type=click.Path(path_type=Path),
    help="Who may sign seals, as ssh-keygen has them. [default: .github/allowed_signers of the rows' checkout]",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def site(
    results: tuple[Path, ...],
    out: Path,
    repository: str | None,
    changelog: Path | None,
    again: Path | None,
    signers: Path | None,
    as_json: bool,
) -> None:
    """Write the leaderboard of RESULTS as static pages that open from disk, without network or server.

    RESULTS are folders of runs, folders of such folders, or Parquet files of rows.
    """
    from leakbench.site.build import build
    from leakbench.site.data import Options

    built = build(runs_below(results), out, Options(repository, changelog, again, signers))
    if as_json:
        print_json({"index": str(built.index), "pages": built.pages, "rows": built.rows})
    else:
        click.echo(f"{built.pages} pages of {built.rows:,} rows: open {built.index}")
