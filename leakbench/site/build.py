"""`leakbench site`: every page of every kind, written to a folder that opens from disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from leakbench.errors import UserError
from leakbench.schema import BENCHMARK_VERSION
from leakbench.site.data import Data, Options
from leakbench.site.kinds import KINDS, NAVIGATION
from leakbench.site.page import Asset, Page

ASSETS = ("site.css", "site.js")
"""The one stylesheet and the one script."""

MARKER = "leakbench-site.txt"
"""A folder that holds this file was made by `build` and may be replaced by it."""


@dataclass(frozen=True)
class Built:
    """What was made.

    Args:
        index: The start page.
        pages: Number of pages.
        rows: Number of rows behind them.
    """

    index: Path
    pages: int
    rows: int


def environment() -> Environment:
    """Return the templates' environment: everything is escaped, and a name that is missing is an error."""
    return Environment(
        loader=PackageLoader("leakbench.site", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def build(results: Sequence[Path], out: Path, options: Options | None = None) -> Built:
    """Write the site of all rows under ``results``: the same rows give the same files.

    Args:
        results: Folders of runs, folders of such folders, or Parquet files of rows.
        out: Folder to write; one that holds something else is refused.
        options: See `Options`.

    Raises:
        UserError: There are no rows, or the folder cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder, got a file; use another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"--out {out}: holds files that are no site; use another --out or an empty folder")
    with warnings.catch_warnings():
        # A frame is kept in the pieces that it was read in, to save memory; pandas takes that for a mistake.
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)
        return _build(Data(results, options or Options()), out)


def _build(data: Data, out: Path) -> Built:
    templates = environment()
    shared = {"navigation": NAVIGATION, "version": BENCHMARK_VERSION, "date": data.date, "rows": len(data.rows)}
    written: set[Path] = set()
    count = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("Made by `leakbench site`, which may replace what is in this folder.\n")
        for name in ASSETS:
            written.add(_write(out, Asset(name, files("leakbench.site").joinpath("assets", name).read_bytes())))
        for produce in KINDS:
            for page in produce(data):
                if isinstance(page, Page):
                    root = "../" * page.path.count("/")
                    context = {"page": page, "root": root, **shared, **page.context}
                    text = templates.get_template(page.template).render(context)
                    page, count = Asset(page.path, text.encode()), count + 1
                written.add(_write(out, page))
        from leakbench.site.downloads import write_others, write_rows

        written |= {write_rows(data, out / "rows.parquet"), *write_others(data, out)}
        _clear(out, written)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); use another --out") from None
    return Built(out / "index.html", count, len(data.rows))


def _write(out: Path, asset: Asset) -> Path:
    path = out / asset.path
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    path.write_bytes(asset.content)
    return path


def _clear(out: Path, written: set[Path]) -> None:
    """Remove pages of an earlier build whose rows are gone."""
    for path in out.rglob("*"):
        if path.is_file() and path not in written and path.name != MARKER:
            path.unlink()


def digest(out: Path) -> str:
    """Return a digest of all files of a site."""
    total = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(out)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
