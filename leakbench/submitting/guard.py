"""What a pull request touches, read from git objects alone: nothing of it is checked out or run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from leakbench.errors import UserError
from leakbench.submitting.check import MOST_BYTES

ENTRY = re.compile(r"baselines/(attacks|defenses)/([a-z][a-z0-9_]{0,48})\.py")
DATA = re.compile(r"tests/data/([a-z][a-z0-9_]{0,48})/[A-Za-z0-9][A-Za-z0-9_.-]*\.(json|csv|yaml|txt)")
SCORERS = ".github/scorers.txt"
MOST_DATA = 1 << 20
"""Most bytes of all test data together: enough for reference values, too little for a table of answers."""

ChangeKind = Literal["submission", "revision", "rows", "core", "nothing"]


@dataclass(frozen=True)
class Change:
    """One changed path.

    Args:
        path: Path in the repository.
        status: Git's letter: A, M, D, T.
        mode: Mode of the new file; 100644 is a plain one.
        blob: Its object id.
    """

    path: str
    status: str
    mode: str
    blob: str


@dataclass
class Guarded:
    """What a change is.

    Args:
        kind: ``submission``: one new entry; ``revision``: one that is here already; ``rows``: results; ``core``:
            anything else, for another review; ``nothing``.
        entry: Path of the entry of a submission or a revision.
        name: Its name.
        problems: Why it is refused.
        files: Every path.
        head: The commit.
        blob: Object id of the entry.
    """

    kind: ChangeKind
    head: str
    entry: str | None = None
    name: str | None = None
    blob: str | None = None
    problems: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it as lines."""
        what = {
            "submission": f"a submission of {self.entry}",
            "revision": f"a revision of {self.entry}, which is here already: reviewed by maintainers before it is run",
            "rows": "rows of results",
            "core": "a change of leakbench itself: reviewed by maintainers, not evaluated as a submission",
            "nothing": "no change",
        }[self.kind]
        return [f"{len(self.files)} files: {what}", *(f"refused: {text}" for text in self.problems)]


def guard(repository: Path, base: str, head: str, *, actor: str = "") -> Guarded:
    """Classify what merging ``head`` into ``base`` changes in ``base``.

    Args:
        repository: Checkout or bare repository that holds both commits.
        base: Commit that is trusted.
        head: Commit that is not.
        actor: Who asks, as the platform tells it; never read from the commits, where anyone can be written.

    Raises:
        UserError: A commit is not known here, or the two have no history in common.
    """
    first, last = (_commit(repository, name) for name in (base, head))
    merged, problems = _merged(repository, first, last)
    changes = list(_changes(repository, first, merged))
    paths = [change.path for change in changes]
    found = Guarded("core" if changes else "nothing", last, problems=problems, files=paths)
    # A file system that ignores case takes Results/ for results/; what does not print could hide either.
    rows = [path for path in paths if path.split("/")[0].casefold() == "results"]
    found.problems += [f"{path!a}: expected a name of printable characters" for path in paths if not path.isprintable()]
    entries = [change for change in changes if ENTRY.fullmatch(change.path)]
    if rows:
        found.kind = "rows"
        if actor not in _scorers(repository, first):
            who = actor or "an unnamed actor"
            found.problems.append(
                f"{_shown(rows[0])}: rows are written by the scoring identity only, not by {who}; "
                "leave results/ as it is, the project runs your entry itself"
            )
        if others := [path for path in paths if path not in rows]:
            found.problems.append(f"{_shown(others[0])}: rows come in a change of their own")
        return found
    others = [path for path in paths if not ENTRY.fullmatch(path) and not DATA.fullmatch(path)]
    if len(entries) == 1 and not others:
        (entry,) = entries
        new = all(change.status == "A" for change in changes)
        found.kind, found.entry, found.blob = "submission" if new else "revision", entry.path, entry.blob
        found.name = Path(entry.path).stem
        found.problems += _submission(repository, changes, entry)
        if entry.status == "M" and entry.mode == "100644":
            found.problems += _unraised(repository, first, entry)
    return found


def _shown(path: str) -> str:
    return path if path.isprintable() else ascii(path)


def _merged(repository: Path, base: str, head: str) -> tuple[str, list[str]]:
    """Return the tree that merging gives and what keeps it from being one that can be relied on.

    What head changed since it left base is not what merging does: where the two met more than once, head may hold as
    its own what base has replaced.
    """
    met = _run(repository, "merge-base", "--all", base, head, fine=(0, 1)).split()
    if not met:
        raise UserError("the two commits have no history in common; branch off the base and apply the change there")
    problems = []
    if len(met) > 1:
        problems.append(f"its history and the base's met {len(met)} times; apply the change to the base as one commit")
    tree, *conflicts = (
        _run(repository, "merge-tree", "--write-tree", "--name-only", "--no-messages", "-z", base, head, fine=(0, 1))
        .decode(errors="surrogateescape")
        .rstrip("\0")
        .split("\0")
    )
    if conflicts:
        problems.append(f"{_shown(conflicts[0])}: conflicts with the base; rebase onto it")
    return tree, problems


def _unraised(repository: Path, base: str, entry: Change) -> Iterator[str]:
    """Yield what is wrong with the version of a changed entry, read from the text alone."""
    before = _versions(_run(repository, "show", f"{base}:{entry.path}"))
    after = _versions(_run(repository, "cat-file", "blob", entry.blob))
    if not after:
        yield f'{entry.path}: no version can be read; write @register("{Path(entry.path).stem}", version=2)'
    elif before and max(after) <= max(before):
        yield f"{entry.path}: version {max(after)}, expected more than {max(before)}: a changed entry raises `version`"


def _versions(source: bytes) -> list[int]:
    """Return the numbers given as ``version`` to ``@register`` in a source."""
    try:
        tree = ast.parse(source[: MOST_BYTES + 1])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls = [
        decorator
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) == "register"
    ]
    words = [word.value for call in calls for word in call.keywords if word.arg == "version"]
    return [w.value for w in words if isinstance(w, ast.Constant) and type(w.value) is int]


def _submission(repository: Path, changes: list[Change], entry: Change) -> Iterator[str]:
    """Yield what is wrong with a submission."""
    total = 0
    for change in changes:
        if change.status == "D":
            yield f"{change.path}: is removed; entries are superseded by a higher version, never removed"
            continue
        if change.mode != "100644":
            yield f"{change.path}: expected a plain file (mode 100644), got mode {change.mode}"
            continue
        size = int(_git(repository, "cat-file", "-s", change.blob))
        if change is entry:
            if size > MOST_BYTES:
                yield f"{change.path}: {size:,} bytes, expected at most {MOST_BYTES:,}"
            continue
        total += size
        match = DATA.fullmatch(change.path)
        if match is None or match[1] != Path(entry.path).stem:
            yield f"{change.path}: expected test data of this entry under tests/data/{Path(entry.path).stem}/"
    if total > MOST_DATA:
        yield f"test data of {total:,} bytes, expected at most {MOST_DATA:,}"


def place_entry(repository: Path, found: Guarded) -> Path:
    """Write the entry file of a submission, and nothing else of it, into the checkout.

    Git is told to take a changed baseline for unchanged, as it takes a new file for untracked: rows name the commit of
    leakbench and, beside it, the hash of every entry, and none of leakbench's own files has changed.

    Raises:
        UserError: The change is no submission.
    """
    if found.kind not in ("submission", "revision") or found.entry is None or found.blob is None:
        raise UserError(f"--place: expected a submission, got {found.lines()[0]}")
    path = repository / found.entry
    if path.is_symlink() or not path.parent.is_dir():
        raise UserError(f"--place: {path} is a link or has no folder; use a fresh checkout of the base")
    path.write_bytes(_run(repository, "cat-file", "blob", found.blob))
    if _run(repository, "ls-files", "--", found.entry):
        _run(repository, "update-index", "--assume-unchanged", "--", found.entry)
    return path


def _scorers(repository: Path, base: str) -> frozenset[str]:
    """Return the scoring identities as the trusted commit names them, one login a line."""
    try:
        text = _run(repository, "show", f"{base}:{SCORERS}").decode()
    except UserError:
        return frozenset()
    return frozenset(line.partition("#")[0].strip() for line in text.splitlines()) - {""}


def _commit(repository: Path, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", name):
        raise UserError(f"commit {name!r}: expected a hash or a branch")
    return _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", name=name)


def _changes(repository: Path, base: str, head: str) -> Iterator[Change]:
    """Yield every path that differs between two trees; renames are a removal and an addition."""
    raw = _run(repository, "diff-tree", "-r", "--raw", "-z", "--no-renames", "--no-abbrev", base, head).decode(
        errors="surrogateescape"
    )
    fields = raw.split("\0")
    for about, path in zip(fields[::2], fields[1::2], strict=False):
        _, mode, _, blob, status = about.split(" ")
        yield Change(path, status[0], mode, blob)


def _git(repository: Path, *arguments: str, name: str = "") -> str:
    return _run(repository, *arguments, name=name).decode().strip()


def _run(repository: Path, *arguments: str, name: str = "", fine: tuple[int, ...] = (0,)) -> bytes:
    git = shutil.which("git")
    if git is None:
        raise UserError("leakbench guard needs git")
    command = [git, "-C", str(repository), "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)  # noqa: S603
    if done.returncode not in fine:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"git: {said[-1] if said else f'no commit {name} here; fetch it first'}")
    return done.stdout
