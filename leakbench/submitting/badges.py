"""How far a row has come on the way from a claim to a fact: badges, computed from rows and files. No torch here.

Nobody types a badge. ``claimed``, ``rerun`` and ``reproduced`` follow from where rows lie and what they hold;
``confirmed`` and ``disputed`` from ``statements.yaml`` beside the rows, each with a link to where it was said.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, ValidationError

from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT
from leakbench.metrics import METRICS
from leakbench.parts import Part
from leakbench.store import job_files
from leakbench.submitting.rerun import ATOL, RTOL
from leakbench.submitting.seal import SEAL, broken_seal, sealed_files, signer_of
from leakbench.suites import read_yaml

BADGES = {
    "claimed": "no seal that the project signed, or a public key: for development, no record, and maybe made up",
    "rerun": "measured by the project: under a seal it signed, in a secret season, in bwrap or a container, from a "
    "clean checkout",
    "confirmed": "rerun, and an author of the entry agrees that it is their method as they mean it",
    "reproduced": "rerun, and measured again on another kind of machine, every number within its tolerance",
    "disputed": "somebody showed a reason to doubt it, and that is not settled; stands beside the others",
}
"""What each badge means."""

STATEMENTS = "statements.yaml"
ISOLATED = ("bwrap", "container")
_ROW = ("job_id", "trial")
_KINDS = Literal["attack", "defense"]


class Statement(Part):
    """What somebody said of an entry, and where."""

    kind: _KINDS
    """``attack`` or ``defense``."""
    name: str
    """Registered name."""
    version: Annotated[int, Field(ge=1)]
    """Version it is about; a later one starts anew."""
    by: str
    """Who."""
    link: Annotated[str, Field(pattern=r"^https://\S+$")]
    """Where it can be read."""
    settled: bool = False
    """Of a dispute: whether it is over."""


class Statements(Part):
    """Everything that was said."""

    confirmed: list[Statement] = Field(default_factory=list)
    """By authors of entries."""
    disputed: list[Statement] = Field(default_factory=list)
    """By anybody, with a reason."""

    def about(self, keys: Mapping[str, Any]) -> list[tuple[str, Statement]]:
        """Return what was said of the attack or defense of a cell, after what kind of statement it is.

        Args:
            keys: ``attack``, ``attack_version``, ``defense`` and ``defense_version``.
        """
        said = [("confirmed", s) for s in self.confirmed]
        said += [("dispute settled" if s.settled else "disputed", s) for s in self.disputed]
        return [
            (word, s)
            for word, s in said
            if s.name in str(keys[s.kind]).split("+") and keys[f"{s.kind}_version"] == s.version
        ]


def read_statements(folders: Iterable[Path]) -> Statements:
    """Return the statements in folders of rows and in the folders around them.

    Raises:
        UserError: A file is wrong.
    """
    all_ = Statements()
    for place in dict.fromkeys(place for folder in folders for place in (folder, folder.parent)):
        path = place / STATEMENTS
        if path.is_file():
            try:
                found = Statements.model_validate(read_yaml(path))
            except ValidationError as error:
                detail = error.errors()[0]
                raise UserError(f"{path}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
            all_ = Statements(confirmed=[*all_.confirmed, *found.confirmed], disputed=[*all_.disputed, *found.disputed])
    return all_


SIGNERS = Path(".github") / "allowed_signers"
"""Who may sign seals, beside the results in their checkout; reviewed like the code."""


def allowed_signers(folder: Path) -> Path | None:
    """Return the signers of the checkout that a folder is in; None where it is in none, or that has none."""
    place = folder.resolve()
    checkout = next((path for path in (place, *place.parents) if (path / ".git").exists()), None)
    return checkout / SIGNERS if checkout is not None and (checkout / SIGNERS).is_file() else None


def sealed_jobs(folders: Iterable[Path], signers: Path | None = None) -> set[str]:
    """Return the jobs whose rows lie under a seal that holds and that a signer signed, and nowhere else.

    Args:
        folders: Folders of runs; of each, seals in it and in the folder around it count.
        signers: Allowed signers; None: `SIGNERS` of the checkout that a folder is in, and none where there is none.

    Raises:
        UserError: There is no file of signers where one is named.
    """
    if signers is not None and not signers.is_file():
        raise UserError(f"--signers {signers}: expected a file of allowed signers, as ssh-keygen has them")
    sealed, loose = set[str](), set[str]()
    for folder in folders:
        trusted = signers or allowed_signers(folder)
        places = [place for place in (folder, folder.parent) if (place / SEAL).is_file()]
        covered: set[Path] = set()
        if trusted is not None and not any(any(broken_seal(place)) for place in places):
            signed = [place for place in places if _is_signed(place, trusted)]
            covered = {place / name for place in signed for name in sealed_files(place)}
        for job in job_files(folder):
            (sealed if job.path in covered else loose).add(job.job_id)
    return sealed - loose


def _is_signed(place: Path, signers: Path) -> bool:
    try:
        return bool(signer_of(place, signers))
    except UserError:
        return False


def least(found: Iterable[str]) -> str:
    """Return the badge of several rows: the least of theirs, disputed where one of them is."""
    found = list(found)
    names = list(BADGES)
    low = min((badge.removesuffix(" disputed") for badge in found), key=names.index)
    return f"{low} disputed" if any(badge.endswith(" disputed") for badge in found) else low


def badges(
    rows: pd.DataFrame,
    *,
    sealed: Container[str],
    again: pd.DataFrame | None = None,
    statements: Statements | None = None,
) -> pd.Series[str]:
    """Return the badge of every row, `` disputed`` after it where it is.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them.
        sealed: Jobs under a signed seal that holds, as `sealed_jobs` finds them.
        again: Rows of the same jobs that another machine made.
        statements: What was said of entries.
    """
    said = statements or Statements()
    clean = ~rows["git_dirty"].astype("boolean").fillna(value=True).astype(bool)
    secret = rows["season_commitment"] != DEVELOPMENT.commitment
    rerun = rows["isolation"].isin(list(ISOLATED)) & clean & secret
    rerun &= rows["job_id"].map(lambda job: job in sealed).astype(bool)
    badge = pd.Series("claimed", index=rows.index, dtype=object).mask(rerun, "rerun")
    badge = badge.mask(rerun & _about(rows, said.confirmed), "confirmed")
    if again is not None:
        badge = badge.mask(rerun & _reproduced(rows, again), "reproduced")
    doubted = _about(rows, [statement for statement in said.disputed if not statement.settled])
    return badge.mask(doubted, badge + " disputed")


def _about(rows: pd.DataFrame, statements: Sequence[Statement]) -> pd.Series[bool]:
    """Return which rows are of an entry that a statement is about, as a part of a chain or alone."""
    found = pd.Series(data=False, index=rows.index)
    for statement in statements:
        names = rows[statement.kind].astype(object).fillna("")
        named = names.map(lambda chain, name=statement.name: name in chain.split("+")).astype(bool)
        found |= named & (rows[f"{statement.kind}_version"].astype(object) == statement.version)
    return found


def _reproduced(rows: pd.DataFrame, again: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows another kind of machine measured, too, with the same status and numbers."""
    names = ["host_kind", "device", "status", *(name for name in METRICS if METRICS[name].target != "stealth")]
    other = again.drop_duplicates(list(_ROW)).set_index(list(_ROW))[names]
    other = other.reindex(pd.MultiIndex.from_frame(rows[list(_ROW)]))
    other.index = rows.index
    elsewhere = (other["host_kind"] != rows["host_kind"]) | (other["device"] != rows["device"])
    agrees = other["status"].notna() & elsewhere & (other["status"] == rows["status"])
    for name in names[3:]:
        then, now = rows[name].astype(float), other[name].astype(float)
        agrees &= ((then - now).abs() <= ATOL + RTOL * then.abs()) | (then.isna() & now.isna())
    return agrees
