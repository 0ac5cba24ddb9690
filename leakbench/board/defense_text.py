"""The board of defenses as text: terminal, Markdown, CSV and JSON. rich is imported by the terminal only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from leakbench import autoleak
from leakbench.board.autoleak import AUTOLEAK_COLUMNS, MEMBER_COLUMNS, OVERLAP_COLUMNS
from leakbench.board.columns import DEMONSTRATION_DATASETS, TASK_KEYS
from leakbench.board.curves import CLASSES, COARSE, RANKING_COLUMNS, SETTING_COLUMNS, WIDEST
from leakbench.board.defenses import STANDING_COLUMNS, TABLE_KEYS
from leakbench.board.render import markdown_lines
from leakbench.board.score import group_ids
from leakbench.board.stats import CONFIDENCE, RESAMPLES
from leakbench.keys import DEVELOPMENT

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "ranking": RANKING_COLUMNS,
    "settings": SETTING_COLUMNS,
    "tasks": STANDING_COLUMNS,
    "autoleak": AUTOLEAK_COLUMNS,
    "members": MEMBER_COLUMNS,
    "overlap": OVERLAP_COLUMNS,
}
"""Every table with its columns, in the order of printing."""


WIDTH = 110
"""Least width of printed tables, in characters: labels of defenses are long."""


@dataclass(frozen=True)
class Sheet:
    """One printed table.

    Args:
        title: What it is about.
        header: Headings; the first column holds texts.
        lines: Texts, as many as headings.
        notes: What the reader has to know.
    """

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]


def _number(value: Any, places: int = 2) -> str:
    return "-" if pd.isna(value) else f"{value:z.{places}f}"


def _attack(label: Any) -> str:
    """Return an attack's name without its parameters, for want of room; JSON and CSV have them."""
    return "-" if pd.isna(label) else str(label).partition("(")[0]


def _interval(value: Any, low: Any, high: Any, places: int = 2) -> str:
    text = _number(value, places)
    return text if text == "-" or pd.isna(low) else f"{text} [{_number(low, places)}, {_number(high, places)}]"


def _places(target: str) -> int:
    return 1 if target == "inputs" else 2


def sheets(tables: Mapping[str, pd.DataFrame]) -> Iterator[Sheet]:
    """Yield the printed tables.

    Args:
        tables: What `leakbench.board.curves.board` returns, or some of them.
    """
    for name, build in _SHEETS.items():
        if name in tables and len(tables[name]):
            yield from build(tables[name])


def notes(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return the lines that stand above: what the numbers may be used for."""
    frame = pd.concat([tables[name] for name in tables if "season" in tables[name]] or [pd.DataFrame({"season": []})])
    lines = [
        f"season {season}: a public key, for development; no records."
        for season in frame["season"].dropna().unique()
        if season == DEVELOPMENT.name
    ]
    shown = set(frame["dataset"].dropna()) if "dataset" in frame else set()
    lines += [
        f"{name} is a demonstration lane, never ranked officially." for name in sorted(DEMONSTRATION_DATASETS & shown)
    ]
    return lines


def _title(first: pd.Series[Any]) -> str:
    lane = "no lane" if pd.isna(first["lane"]) else f"lane {first['lane']}"
    return f"{lane}, {first['target']}, {first['dataset']} (season {first['season']})"


def _ranking(frame: pd.DataFrame) -> Iterator[Sheet]:
    for _, part in frame.groupby(group_ids(frame, TABLE_KEYS), sort=False):
        first = part.iloc[0]
        classes = [points for points in CLASSES if points > 1 or first["dataset"] not in COARSE]
        lines = []
        for line in part[part["unranked_because"].isna()].to_dict("records"):
            texts = [line["curve"]]
            for points in classes:
                value, low, high = (line[f"{name}_at_{points}"] for name in ("privacy", "low", "high"))
                rank, setting = line[f"rank_at_{points}"], line[f"setting_at_{points}"]
                sure = "" if line[f"sure_at_{points}"] else "?"
                where = "" if pd.isna(setting) else f" #{rank:.0f}{sure} {setting.removeprefix(line['defense'])}"
                texts.append(_interval(value, low, high) + where)
            volume = _interval(line["hypervolume"], line["hypervolume_low"], line["hypervolume_high"])
            lines.append([*texts, volume, f"{line['settings']}" + (" (partial)" if line["partial"] else "")])
        out = part[part["unranked_because"].notna()]
        said = [
            f"not ranked, {why}: {', '.join(own['curve'])}" for why, own in out.groupby("unranked_because", sort=False)
        ]
        said += [f"in no class: {text}" for text in part["no_class_because"].dropna()]
        yield Sheet(
            f"defenses, {_title(first)}",
            ["defense", *(f"privacy at <= {points} points lost" for points in classes), "hypervolume", "strengths"],
            lines,
            [
                f"privacy: 0 as undefended, 1 as without the update; {CONFIDENCE:.0%} intervals; #: rank group, those "
                "of one cannot be told apart; hypervolume: area below (utility, privacy) of all strengths"
                "; ?: the interval of the drop goes beyond the class"
                + (f"; 1 point: only where the drop's interval is below {WIDEST} points wide" if 1 in classes else ""),
                *said,
            ],
        )


def _settings(frame: pd.DataFrame) -> Iterator[Sheet]:
    for _, part in frame.groupby(group_ids(frame, TABLE_KEYS), sort=False):
        first = part.iloc[0]
        lines, said = [], []
        for line in part.to_dict("records"):
            lines.append(
                [
                    line["defense_label"],
                    _interval(line["privacy"], line["privacy_low"], line["privacy_high"]),
                    _number(line["privacy_static"]) if line["role"] == "defense" else "",
                    _attack(line["worst_attack"]),
                    _interval(line["drop"], line["drop_low"], line["drop_high"], 1),
                    f"{line['tasks']}/{line['of_tasks']}",
                ]
            )
            said += [f"warning: {line['defense_label']}: {line['warnings']}"] * isinstance(line["warnings"], str)
            for text in (line["no_class_because"], line["no_utility_because"]):
                out = line["role"] == "defense" and isinstance(text, str)
                said += [f"{line['defense_label']}: {text}"] * out
        dropped = int(first["dropped"])
        if dropped:
            said.insert(0, f"{dropped} tasks left out: undefended, no attack gets far enough above the floor")
        yield Sheet(
            f"every strength, {_title(first)}",
            ["defense", "privacy", "static", "worst attack", "points lost", "tasks"],
            lines,
            [
                "static: privacy under attacks that the defense does not name, of what they reach undefended; points "
                "lost of accuracy",
                *_trainings(part),
                *said,
            ],
        )


def _trainings(part: pd.DataFrame) -> Iterator[str]:
    """Yield of which trainings the accuracy is."""
    for (training, others), own in part.groupby(["training", "other_trainings"], sort=False):
        spread = ", ".join(dict.fromkeys(own["partitions"].dropna()))
        text = f"accuracy of {training}" + f"; {spread}" * bool(spread)
        yield text + f"; {others} other settings of training are less like what was attacked" * bool(others)


def _tasks(frame: pd.DataFrame) -> Iterator[Sheet]:
    for _, part in frame.groupby(group_ids(frame, TASK_KEYS), sort=False):
        first = part.iloc[0]
        places = _places(first["target"])
        lines = []
        for line in part.to_dict("records"):
            worst = _interval(line["worst"], line["ci_low"], line["ci_high"], places)
            gap = _interval(line["gap"], line["gap_low"], line["gap_high"])
            privacy = _interval(line["privacy"], line["privacy_low"], line["privacy_high"])
            lines.append([line["defense_label"], worst, _attack(line["worst_attack"]), privacy, gap])
        note = (
            f"undefended {_number(first['undefended'], places)} ({first['undefended_attack']}), floor "
            f"{_number(first['floor'], places)} ({first['floor_source']}); gap: what rested on attackers not "
            "knowing, below 0: nothing did"
        )
        if not first["informative"]:
            note += "; left out above: undefended is not far enough above the floor"
        yield Sheet(f"{first['task']}", ["defense", "worst mean", "attack", "privacy", "gap"], lines, [note])


def _autoleak(frame: pd.DataFrame) -> Iterator[Sheet]:
    for _, part in frame.groupby(group_ids(frame, TASK_KEYS), sort=False):
        first = part.iloc[0]
        places = _places(first["target"])
        lines = [
            [
                line["defense_label"],
                _score(line, places),
                _attack(line["worst_member"]),
                _number(line["reference"], places),
                _number(line["maximum"], places),
                _number(line["maximum_floor"], places),
            ]
            for line in part.to_dict("records")
        ]
        said = {
            "not applicable somewhere": part["declined"],
            "not run somewhere": part["missing"],
            "rows of an older version, or of another source, are left out": part["older"],
        }
        yield Sheet(
            f"AutoLeak v{autoleak.VERSION}: {first['task']}",
            [
                "defense",
                "worst mean",
                "member",
                "floor" if first["target"] == "inputs" else "chance",
                "max",
                "its floor",
            ],
            lines,
            [
                "max: of the members in each trial, an oracle's choice; its floor: the same where nothing is sent",
                *(f"{what}: {text}" for what, texts in said.items() for text in texts.dropna().unique()),
            ],
        )


def _score(line: Mapping[Any, Any], places: int) -> str:
    if line["complete"]:
        return _interval(line["worst"], line["ci_low"], line["ci_high"], places)
    run = line["of_members"] - len(line["missing"].split(", "))
    return f"incomplete {run}/{line['of_members']} ({_number(line['worst'], places)})"


def _members(frame: pd.DataFrame) -> Iterator[Sheet]:
    for target, part in frame.groupby("target", sort=False):
        lines = [
            [
                line["member"],
                f"{line['worst_in']}/{line['cells']}",
                _number(line["worst_drop"], 3),
                _number(line["worst_drop_most"], 3),
                _number(line["maximum_drop"], 3),
                _number(line["maximum_drop_floor"], 3),
                "?" if line["adds"] is None else "yes" if line["adds"] else "NOTHING",
            ]
            for line in part.to_dict("records")
        ]
        header = ["member", "worst in", "drop", "most", "drop of max", "on control", "adds"]
        note = "drop of the worst mean, and of the maximum in each trial, when the member is left out"
        unknown = [f"?: not known, as nobody attacked {autoleak.CONTROL}"] * any(line[-1] == "?" for line in lines)
        yield Sheet(f"what AutoLeak's members add, {target}", header, lines, [note, *unknown])


def _overlap(frame: pd.DataFrame) -> Iterator[Sheet]:
    for target, part in frame.groupby("target", sort=False):
        names = list(dict.fromkeys(part["member"]))
        shares = {(line["member"], line["other"]): line["share"] for line in part.to_dict("records")}
        lines = [[one, *(_number(shares.get((one, other))) for other in names)] for one in names]
        note = "share of the trials in which the member of the line is above chance or floor and the other is as good"
        yield Sheet(f"overlap of AutoLeak's members, {target}", ["", *map(_attack, names)], lines, [note])


_SHEETS = {
    "ranking": _ranking,
    "settings": _settings,
    "tasks": _tasks,
    "autoleak": _autoleak,
    "members": _members,
    "overlap": _overlap,
}


def terminal(tables: Mapping[str, pd.DataFrame], console: Console | None = None) -> None:
    """Print the tables.

    Args:
        tables: See `sheets`.
        console: Where to; standard output by default.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if console.width < WIDTH:
        console.width = WIDTH
    for note in notes(tables):
        console.print(Text(note, style="bold"))
    for sheet in sheets(tables):
        console.print("", Text(sheet.title, style="bold"), sep="\n")
        if sheet.lines:
            grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
            for number, heading in enumerate(sheet.header):
                grid.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
            for line in sheet.lines:
                grid.add_row(*map(Text, line))
            console.print(grid)
        for note in sheet.notes:
            console.print(Text(note, style="dim"))


def markdown(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return the tables as Markdown."""
    parts = ["\n".join(f"> {note}" for note in notes(tables))]
    for sheet in sheets(tables):
        rows = [sheet.header, ["---", *("---:" for _ in sheet.header[1:])], *sheet.lines]
        parts.append("\n".join([f"### {sheet.title}", "", *(markdown_lines(rows) if sheet.lines else [])]))
        parts += [f"*{note}*" for note in sheet.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return every column of every table as JSON; what is unknown is null.

    Returns:
        ``{"meta": ..., TABLE: [...], ...}``
    """
    meta = {
        "notes": notes(tables),
        "columns": {name: COLUMNS[name] for name in tables},
        "autoleak": autoleak.item(),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }
    lines = {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
    return json.dumps({"meta": meta, **lines}, indent=1)


def to_csv(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return every column of the first table as CSV."""
    return str(next(iter(tables.values())).to_csv(index=False))
