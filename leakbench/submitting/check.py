"""The parent's half of `leakbench check`: a file's laws, tried one by one in a child. No entry code runs here.

What a child says of itself could be forged by the entry in it. A check helps authors; it proves nothing to others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from leakbench.entries import Description, try_describe
from leakbench.errors import UserError
from leakbench.sources import EntrySource, Kind, find_source, sources

if TYPE_CHECKING:
    from leakbench.submitting.laws import Law

MOST_BYTES = 256 * 1024
"""Greatest entry file: the longest baseline has 16 KiB, and a table of answers should not fit."""
SECONDS = 60.0
"""Time a law may take; the slowest baseline takes 13 s on one core."""
MEMORY = 4 << 30
PLACEHOLDER = "TODO"
"""What a skeleton has where an author has to write."""

State = Literal["ok", "failed", "todo", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What became of one law.

    Args:
        law: Its title.
        state: ``ok``; ``failed``; ``todo``, which is to be done before submitting; ``skipped`` for want of an earlier.
        text: A remark, or what to do.
    """

    law: str
    state: State
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """What `check` found.

    Args:
        file: What was checked.
        kind: ``attack`` or ``defense``; None where that is not known.
        name: Registered name.
        findings: One per law, in order.
    """

    file: str
    kind: str | None
    name: str | None
    findings: list[Finding]

    def passed(self, *, strict: bool = False) -> bool:
        """Whether nothing failed; ``strict``: and nothing is left to do."""
        bad = ("failed", "skipped", "todo") if strict else ("failed", "skipped")
        return not any(finding.state in bad for finding in self.findings)

    def content(self) -> dict[str, Any]:
        """Return the verdict as a JSON-able mapping."""
        return asdict(self) | {"passed": self.passed(), "ready": self.passed(strict=True)}


def check(ref: str, *, isolation: str = "auto", on_finding: Callable[[Finding], None] = lambda _: None) -> Verdict:
    """Try the laws of an entry, in a child process.

    Args:
        ref: ``path/to/file.py`` with or without ``:Class``.
        isolation: ``auto``, ``process`` or ``bwrap``.
        on_finding: Is told of each law as soon as it is tried.

    Raises:
        UserError: There is no such file, or the isolation cannot be had.
    """
    if ".py" not in ref:
        raise UserError(
            f"{ref}: expected path/to/file.py or path/to/file.py:Class; start one with: leakbench new attack"
        )
    findings: list[Finding] = []

    def found(law: str, state: State, text: str = "") -> bool:
        findings.append(Finding(law, state, text))
        on_finding(findings[-1])
        return state != "failed"

    problem = readable(find_source("attack", ref).path)
    if not found("is a short text file", *_state(problem)):
        return Verdict(ref, None, None, findings)
    source, told = describe_file(ref, isolation)
    if isinstance(told, UserError):
        found(
            "can be imported and described", "failed", _advice(str(told).removeprefix(f"{source.kind} file "), source)
        )
        return Verdict(ref, None, None, findings)
    found("can be imported and described", "ok", f"{told.kind} {told.name!r}, version {told.version}")
    found("has a name of its own, which is its file's", *_named(source.path, told))
    for law, state, text in documented(told):
        found(law, state, text)
    if told.required:
        text = f"give {', '.join(told.required)} a default: the paper's, or the one you would have others run"
        found("every argument has a default", "failed", text)
    else:
        for finding in _behaviour(source, told, isolation):
            found(finding.law, finding.state, finding.text)
    return Verdict(ref, told.kind, told.name, findings)


def readable(path: Path) -> str | None:
    """Return what is wrong with a file as such, without parsing it; None where nothing is."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty; start one with: leakbench new attack NAME"
    if size > MOST_BYTES:
        return f"{size:,} bytes, expected at most {MOST_BYTES:,}; learn or compute in `prepare` what you would store"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start}); an entry is one Python file in plain text"
    return "holds a NUL character; an entry is one Python file in plain text" if "\0" in text else None


def describe_file(ref: str, isolation: str = "auto") -> tuple[EntrySource, Description | UserError]:
    """Return the file as an attack or as a defense, whichever it is, and what it says of itself."""
    from leakbench.runner.isolate import choose_level

    choose_level(isolation)
    # A guess of the kind from the text saves a second child; what the child says decides.
    text = find_source("attack", ref).path.read_text(encoding="utf-8")
    kinds = sorted(get_args(Kind), key=lambda kind: f"({kind.capitalize()})" not in text)
    answers = []
    for kind in kinds:
        source = find_source(kind, ref)
        (told,) = try_describe([source])
        answers.append((source, told))
        # A file that cannot be imported as one kind cannot be as another.
        if not (isinstance(told, UserError) and re.search(r"holds no|expected one registered", str(told))):
            return source, told
    return answers[0]


def _advice(error: str, source: EntrySource) -> str:
    """Add what to do to what a child reported of an import."""
    hints = {
        "SyntaxError": "correct the Python",
        "IndentationError": "correct the Python",
        "ModuleNotFoundError": "entries may import leakbench, numpy, scipy, sklearn, torch and the standard library",
        "PermissionError": "an entry may read its own file and installed packages only; nothing happens at import",
        "longer than": "nothing but definitions belongs on the module's level",
        "expected one registered": "put @register('name', version=1) above the class",
        "out of memory": "an import may use 4 GiB",
    }
    hint = next((text for word, text in hints.items() if word in error), None)
    return error.removeprefix(f"{source.path}: ") + (f"; {hint}" if hint else "")


def _named(path: Path, told: Description) -> tuple[State, str]:
    """Return what is wrong with where a file lies and with the name it registers."""
    folder = path.resolve().parent
    if folder.parent.name == "baselines" and folder.name in ("attacks", "defenses"):
        wanted = f"{told.kind}s/{told.name}.py"
        if f"{folder.name}/{path.name}" != wanted:
            return "failed", f"registers {told.kind} {told.name!r}; move the file to baselines/{wanted}"
    held = sources(cast("Kind", told.kind))
    if told.name in held and not path.samefile(held.get(told.name).path):
        return "todo", (
            f"{told.kind} {told.name!r} is here already; choose another name, or, to revise that one, "
            f"edit baselines/{told.kind}s/{told.name}.py and raise its version"
        )
    return "ok", ""


def documented(told: Description) -> Iterator[tuple[str, State, str]]:
    """Yield what the docstring lacks, from what a child said of it."""
    lines = told.doc.splitlines()
    first = told.summary
    good = first.endswith((".", "?")) and PLACEHOLDER not in first
    yield (
        "docstring begins with one line",
        *_state(None if good else f"say in one sentence what it does; got {first!r}", "todo"),
    )
    word = "Sees: " if told.kind == "attack" else "Acts on: "
    said = any(line.strip().startswith(word) and PLACEHOLDER not in line for line in lines)
    yield f"docstring says `{word.strip()}`", *_state(None if said else f"write a line `{word}...` for readers", "todo")
    missing = [name for name in told.params if not any(line.strip().startswith(f"{name}: ") for line in lines)]
    text = f"describe {', '.join(missing)} under `Args:`"
    yield "docstring describes every argument", *_state(text if missing else None, "todo")
    yield "docstring names its source", *_state(_reference_lacks(told.reference), "todo")


def _reference_lacks(reference: str) -> str | None:
    """Return what to write where a reference is none; ``none; why`` is one."""
    if not reference or PLACEHOLDER in reference:
        return (
            "write `Reference: authors, title, venue, year, arXiv 1234.56789`, or `Reference: none; why there is none`"
        )
    backed = re.search(r"arXiv \d{4}\.\d{4,5}|doi 10\.|openreview \w{8}", reference) or re.match(
        r"none; \w+ \w+", reference
    )
    return None if backed else f"add an identifier (arXiv 1234.56789, doi 10.x/y, openreview ID) to: {reference[:120]}"


def _state(problem: str | None, otherwise: State = "failed") -> tuple[State, str]:
    return ("ok", "") if problem is None else (otherwise, problem)


def _behaviour(source: EntrySource, told: Description, isolation: str) -> Iterator[Finding]:
    """Try the laws one after the other in one child; after a death or a timeout the rest is skipped."""
    import torch

    from leakbench.data import load_dataset
    from leakbench.runner.children import ChildFailed
    from leakbench.runner.isolate import ChildServer, choose_level
    from leakbench.runner.wire import Blob
    from leakbench.submitting.attack_laws import ATTACK_LAWS
    from leakbench.submitting.defense_laws import DEFENSE_LAWS

    laws: tuple[Law, ...] = ATTACK_LAWS if told.kind == "attack" else DEFENSE_LAWS
    data = load_dataset("digits")
    examples = Blob.pack({"images": torch.tensor(data.images), "labels": torch.tensor(data.labels)})
    entry = {**source.request(), "kind": told.kind, "name": told.name, "params": {}}
    level = choose_level("process" if isolation == "none" else isolation)
    with ChildServer(level, files=source.files) as server, server.spawn(memory=MEMORY, file_size=1 << 20) as child:
        gone = ""
        try:
            child.ask("entry", {"entry": entry}, {"digits": examples}, expect="ready", seconds=SECONDS)
        except ChildFailed as error:
            gone = "not tried, as it cannot be built"
            yield Finding("can be built with its defaults", "failed", str(error))
        for law in laws:
            if gone:
                yield Finding(law.title, "skipped", gone)
                continue
            try:
                answer = child.ask("law", {"law": law.name}, expect="law", seconds=SECONDS).body
            except ChildFailed as error:
                if error.status == "timeout" or "without an answer" in str(error) or error.status == "oom":
                    gone = f"not tried after the failure in {law.title!r}"
                finding = Finding(law.title, "failed", str(error))
            else:
                finding = _finding(law, answer)
            yield finding
            if finding.state == "failed" and law.first:
                gone = gone or f"not tried before {law.title!r} holds"


def _finding(law: Law, answer: dict[str, Any]) -> Finding:
    from leakbench.runner.children import one_line

    if "broken" in answer:
        return Finding(law.title, "failed", one_line(answer["broken"]))
    remark = answer.get("remark")
    return Finding(law.title, "ok", one_line(remark) if remark else "")
