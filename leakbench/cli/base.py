"""The command line's group, its entry point, and what commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from leakbench.errors import INTERRUPTED, LeakbenchError


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


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, default=str))


def runs_below(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the folders of runs, as `leakbench.store.result_folders`, and warn of files there that are left out."""
    from leakbench.store import result_folders, unreadable

    folders = tuple(result_folders(paths))
    damaged = [path for folder in folders for path in unreadable(folder)]
    if damaged:
        files = "1 damaged file" if len(damaged) == 1 else f"{len(damaged)} damaged files"
        click.echo(f"warning: {files} of rows left out, first {damaged[0]}", err=True)
    return folders


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="leakbench")
def cli() -> None:
    """Benchmark of gradient and model leakage in federated learning."""
