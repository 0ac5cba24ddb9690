"""Commands that publish what was measured: the site."""

from __future__ import annotations

from pathlib import Path

import click

from leakbench.cli.base import cli, print_json


@cli.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder to write."
)
@click.option("--repository", metavar="URL", help="Address of the code, https://..., that pages of entries link to.")
@click.option("--changelog", type=click.Path(path_type=Path), help="Version history. [default: that of a checkout]")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def site(results: tuple[Path, ...], out: Path, repository: str | None, changelog: Path | None, as_json: bool) -> None:
    """Write the leaderboard of RESULTS as static pages that open from disk, without network or server.

    RESULTS are folders of `leakbench run`, folders of Parquet files of rows, or such files.
    """
    from leakbench.site.build import build
    from leakbench.site.data import Options

    built = build(results, out, Options(repository, changelog))
    if as_json:
        print_json({"index": str(built.index), "pages": built.pages, "rows": built.rows})
    else:
        click.echo(f"{built.pages} pages of {built.rows:,} rows: open {built.index}")
