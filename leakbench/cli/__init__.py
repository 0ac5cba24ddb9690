"""The command line: parse, call, print. Everything beyond click is imported by the command that needs it."""

from leakbench.cli import catalogue, publishing, reading, running, submitting
from leakbench.cli.base import cli, main
from leakbench.cli.catalogue import KINDS

__all__ = ["KINDS", "catalogue", "cli", "main", "publishing", "reading", "running", "submitting"]
