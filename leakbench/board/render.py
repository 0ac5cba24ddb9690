"""The board as text: terminal, Markdown, CSV and JSON. rich is imported by the terminal only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from leakbench.board.columns import (
    CELL_KEYS,
    COLUMNS,
    DEMONSTRATION_DATASETS,
    OVERSTATES,
    TASK_KEYS,
    entry_label,
    entry_parameters,
)
from leakbench.board.lanes import EXACT, LANE_COLUMNS, LANE_KEYS
from leakbench.board.score import TABLE_COLUMNS, group_ids
from leakbench.board.stats import CONFIDENCE, RESAMPLES
from leakbench.keys import DEVELOPMENT
from leakbench.metrics import METRICS, headline
from leakbench.stage import stage_order
from leakbench.tasks import INFERENCE

if TYPE_CHECKING:
    from rich.console import Console

Line = Mapping[Any, Any]
"""One cell, by column name."""

_LONGEST_LABEL = 40


@dataclass(frozen=True)
class ViewColumn:
    """One column of the printed tables: a new one is a new entry of `VIEW`.

    Args:
        title: Its heading; ``{metric}`` and ``{reference}`` are filled in.
        text: What it shows of a cell.
        right: Whether it is aligned to the right.
        shown: Whether a table has it.
        wide: Whether it is left out in the terminal, for want of room.
        room: Whether it stays in the terminal beside what clients could notice, or statistics over trials.
    """

    title: str
    text: Callable[[Line], str]
    right: bool = True
    shown: Callable[[pd.DataFrame], bool] = lambda _: True
    wide: bool = False
    room: bool = True


def _number(value: float, target: str) -> str:
    return "-" if pd.isna(value) else f"{value:z.1f}" if target == "inputs" else f"{value:z.2f}"


def _interval(line: Line) -> str:
    value, low, high = (_number(line[key], line["target"]) for key in ("mean", "ci_low", "ci_high"))
    return value if value == "-" else f"{value} [{low}, {high}]" if low != "-" else f"{value} [?]"


def _edge(line: Line) -> str:
    return _number(line["gain" if line["target"] == "inputs" else "advantage"], line["target"])


def _trials(line: Line) -> str:
    if line["n"]:
        return f"{line['ok']}/{line['n']}"
    return "n/a" if line["not_applicable"] else "unavailable"


def _exact(line: Line) -> str:
    return _number(line[EXACT[line["target"]]], "labels") + ("∪" if line["attributed"] is False else "")


def _detected(line: Line) -> str:
    return _number(line["detected"], "labels") + (
        "+" if isinstance(line["inserted"], str) and not pd.isna(line["detected"]) else ""
    )


def _known(column: str) -> Callable[[pd.DataFrame], bool]:
    return lambda table: bool(table[column].notna().any())


def _tie(line: Line) -> str:
    return "" if pd.isna(line["rank_group"]) else str(int(line["rank_group"]))


VIEW: tuple[ViewColumn, ...] = (
    ViewColumn("attack", lambda c: c["attack_short"], right=False),
    ViewColumn("{metric}", _interval),
    ViewColumn("{reference}", lambda c: _number(c["reference"], c["target"])),
    ViewColumn("empty", lambda c: _number(c["empty"], c["target"]), shown=_known("empty")),
    ViewColumn("{edge}", _edge, room=False),
    ViewColumn("AUC", lambda c: _number(c["auc"], "labels"), shown=_known("auc")),
    ViewColumn("TPR@1%", lambda c: _number(c["tpr_at_1pct_fpr"], "labels"), shown=_known("auc")),
    ViewColumn("bits", lambda c: _number(c["inference_bits"], "labels"), shown=_known("auc")),
    ViewColumn("{exact}", _exact, shown=_known("detected")),
    ViewColumn("detected", _detected, shown=_known("detected")),
    ViewColumn(
        "D-SNR", lambda c: "-" if pd.isna(c["d_snr"]) else f"{c['d_snr']:.2g}", shown=_known("detected"), wide=True
    ),
    ViewColumn("refused", lambda c: _number(c["refused"], "labels"), shown=lambda t: bool(t["refused"].gt(0).any())),
    ViewColumn("group", _tie, room=False),
    ViewColumn(
        "trials", _trials, shown=lambda t: not _known("detected")(t) or bool((t["ok"] != t["n"]).any())
    ),  # stealth needs the room
    ViewColumn(
        "ms",
        lambda c: "-" if pd.isna(c["seconds"]) else f"{1000 * c['seconds']:.3g}",
        shown=lambda t: not _known("detected")(t),
        room=False,
    ),
)
"""The columns of terminal and Markdown tables that follow the defense, in order."""


@dataclass(frozen=True)
class Table:
    """One printed table: a task.

    Args:
        title: The task and what was compared.
        columns: Those of `VIEW` (or `LANE_VIEW`) that are shown.
        header: Their headings.
        lines: Defense (or attack), and text per column.
        caption: What the reader has to know.
    """

    title: str
    columns: list[ViewColumn]
    header: list[str]
    lines: list[tuple[str, list[str]]]
    caption: str


def notes(board: pd.DataFrame) -> list[str]:
    """Return the lines that stand above a board: what its numbers may be used for."""
    lines = [
        f"season {season}, benchmark {version}"
        + (": a public key, for development; no records." if season == DEVELOPMENT.name else ".")
        for season, version in board[["season", "benchmark_version"]].drop_duplicates().itertuples(index=False)
    ]
    lines += [
        f"{name} is a demonstration lane: it is in every environment, an attack's too, and is never ranked."
        for name in sorted(DEMONSTRATION_DATASETS & set(board["dataset"]))
    ]
    if board["isolation"].str.contains("none").any():
        lines.append("Rows of isolation none were made without the process boundary: to debug, not to publish.")
    if (board["defense_note"] == OVERSTATES).any():
        lines.append(
            f"A defense that {OVERSTATES} changes what the adversary sees of the model, but a server knows what it "
            "sent: such cells have no lane and are never ranked."
        )
    return lines


def _names(target: str) -> dict[str, str]:
    """Return what headings call the ranking metric, what it is compared with, and the difference."""
    spec = headline(target)
    return {
        "metric": spec.name.replace("_", " ") + (f" [{spec.unit}]" if spec.unit != "1" else ""),
        "reference": "floor" if target == "inputs" else "chance",
        "edge": "gain" if target == "inputs" else "advantage",
        "exact": EXACT[target].replace("count_exact_match", "exact").replace("inference_", ""),
    }


def _short_labels(board: pd.DataFrame, kind: str) -> pd.Series[str]:
    """Return labels that fit: a long one keeps the parameters in which entries of its name differ."""
    parameters = board[f"{kind}_params"].map(entry_parameters)

    def short(index: Any) -> str:
        label, name = str(board.at[index, f"{kind}_label"]), str(board.at[index, kind])
        if len(label) <= _LONGEST_LABEL:
            return label
        siblings = parameters[board[kind] == name]
        own = [
            {k: v for k, v in part.items() if any(other[i].get(k) != v for other in siblings)}
            for i, part in enumerate(parameters[index])
        ]
        return entry_label(name, own)

    labels = pd.Series([short(index) for index in board.index], index=board.index, dtype=object)
    # The same name and parameters from another source or version are told apart by the source.
    keys = [f"{kind}_version", f"{kind}_source_sha256"]
    distinct = board[keys].assign(_label=labels).drop_duplicates()
    several = labels.isin(distinct.loc[distinct["_label"].duplicated(), "_label"])
    return labels.mask(several, labels + " @" + board[keys[1]].fillna("no file").str[:7])


def tables(board: pd.DataFrame, *, wide: bool = True) -> Iterator[Table]:
    """Yield one table per task, undefended cells first, then by defense, the best attack first."""
    for _, task in board.groupby(group_ids(board, TASK_KEYS), sort=False):
        first = task.iloc[0]
        task = task.assign(
            defense_short=_short_labels(task, "defense")
            + task["defense_note"].map(lambda note: "" if pd.isna(note) else f" ({note})"),
            attack_short=_short_labels(task, "attack"),
            _defended=task["defense"] != "none",
        ).sort_values(["_defended", "defense_label", "mean"], ascending=[True, True, False], kind="stable")
        names = _names(first["target"])
        where = [str(first["season"]), str(first["lane"]) if not pd.isna(first["lane"]) else "no lane"]
        if not pd.isna(first["checkpoint"]):
            where.append(f"weights {first['checkpoint']}")
        detectable = task["detectable"].median()
        inference, crowded = _known("auc")(task), _known("detected")(task) or _known("auc")(task)
        columns = [c for c in VIEW if c.shown(task) and (wide or (not c.wide and (c.room or not crowded)))]
        yield Table(
            title=f"{first['task']}  ({', '.join(where)})",
            columns=columns,
            header=[column.title.format(**names) for column in columns],
            lines=[(c["defense_short"], [column.text(c) for column in columns]) for c in task.to_dict("records")],
            caption=f"{CONFIDENCE:.0%} bootstrap intervals over trials; a trial that failed, or was declined while "
            f"others were not, counts as {names['reference']}; "
            "attacks of one group cannot be told apart"
            + ("; empty: the same attack on an update that carries nothing" if task["empty"].notna().any() else "")
            + (
                "; detected: share of trials in which a client's plain checks would notice the planted model"
                + ("; +: beside a module inserted in front of the net" if _known("inserted")(task) else "")
                + ("; ∪: counts of all clients together" if task["attributed"].isin([False]).any() else "")
                if _known("detected")(task)
                else "; ms: milliseconds per trial"
                if any(column.title == "ms" for column in columns)
                else ""
            )
            + ("; TPR@1%: true positives at 1% false ones" if inference else "")
            + (f"; detectable difference about {detectable:.2g}" if detectable > 0 else ""),
        )


def terminal(board: pd.DataFrame, lanes: pd.DataFrame | None = None, console: Console | None = None) -> None:
    """Print the board.

    Args:
        board: What `leakbench.board.score.cells` returns.
        lanes: What `leakbench.board.lanes.lanes` returns; printed above.
        console: Where to; standard output by default.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    for note in notes(board):
        console.print(Text(note, style="bold"))
    for lane in () if lanes is None else lane_tables(lanes):
        console.print("", Text(lane.title, style="bold"), sep="\n")
        grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for number, heading in enumerate(["attack", *(text.replace(" ", "\n") for text in lane.header)]):
            grid.add_column(Text(heading), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
        for attack, texts in lane.lines:
            grid.add_row(*map(Text, [attack, *texts]))
        console.print(grid, Text(lane.caption, style="dim"), sep="\n")
    for table in tables(board, wide=False):
        console.print("", Text(table.title, style="bold"), sep="\n")
        every = [table.header, *(texts for _, texts in table.lines)]
        widths = [max(len(texts[i]) for texts in every) for i in range(len(table.columns))]
        # The defense is a line of its own and its attacks a table of the common widths, so that all fits 80 columns.
        for number, (defense, lines) in enumerate(groupby(table.lines, key=lambda line: line[0])):
            part = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
            part.show_header = number == 0
            for heading, width, column in zip(table.header, widths, table.columns, strict=True):
                justify: Literal["left", "right"] = "right" if column.right else "left"
                part.add_column(
                    Text(heading), justify=justify, overflow="fold", no_wrap=column.right, min_width=min(width, 17)
                )
            for _, texts in lines:
                part.add_row(*map(Text, texts))
            console.print(*([""] if number else []), Text(f"vs {defense}", style="bold"), part, sep="\n")
        console.print(Text(table.caption, style="dim"))


def lane_tables(lanes: pd.DataFrame) -> Iterator[Table]:
    """Yield one table per suite, lane, season and stage, the best attack first.

    Of more than `MOST_STAGES` stages the first, the last and some between are shown.
    """
    for keys, lane in lanes.groupby([key for key in LANE_KEYS if key != "stage"], sort=False, dropna=False):
        season, _, _, suite, name, target, demonstration = map(str, keys)
        asked = f" of {target}" if target in INFERENCE else ""
        shown = f"{suite}: lane {name}" if suite else f"lane {name}"
        shown += f"{asked}, {{}}" + (", demonstration" if demonstration == "True" else "")
        stages = sorted(lane["stage"].unique(), key=stage_order)
        left_out = len(stages) - MOST_STAGES
        if left_out > 0:
            stages = [stages[round(i * (len(stages) - 1) / (MOST_STAGES - 1))] for i in range(MOST_STAGES)]
        lane = lane.reset_index(drop=True)
        lane = lane.assign(short=_short_labels(lane, "attack"))
        columns = [column for column in LANE_VIEW if column.shown(lane)]
        for stage in stages:
            yield Table(
                title=f"{shown.format(stage)}  (season {season}, undefended)",
                columns=columns,
                header=[column.title.format(**_names(target)) for column in columns],
                lines=[
                    (line["short"], [column.text(line) for column in columns])
                    for line in lane[lane["stage"] == stage].to_dict("records")
                ],
                caption=f"means over tasks [{CONFIDENCE:.0%} interval]"
                + ("; advantages below -1 count as -1" if target != "inputs" else "")
                + f"; tasks on which an attack did not run count as {_names(target)['reference']}; "
                "attacks of one group cannot be told from its first; below half of the tasks or 6 victims there is none"
                + (f"; {left_out} stages are left out here: --csv" if left_out > 0 else ""),
            )


def _lane_edge(line: Line) -> str:
    edge, low, high = (_number(line[key], line["target"]) for key in ("edge", "edge_low", "edge_high"))
    return edge if edge == "-" else f"{edge} [{low}, {high}]"


LANE_VIEW: tuple[ViewColumn, ...] = (
    ViewColumn("{edge}", _lane_edge),
    ViewColumn("group", _tie),
    ViewColumn(
        "tasks",
        lambda c: f"{c['covered']}/{c['tasks']}",
        shown=lambda t: not _known("detected")(t) or bool((t["covered"] != t["tasks"]).any()),
    ),
    ViewColumn("{metric}", lambda c: _number(c["mean"], c["target"])),
    ViewColumn("{reference}", lambda c: _number(c["reference"], c["target"])),
    ViewColumn("{exact}", lambda c: _number(c["exact"], "labels"), shown=_known("detected")),
    ViewColumn("detected", _detected, shown=_known("detected")),
)
"""The columns of a lane's table that follow the attack, in order."""

MOST_STAGES = 4
"""Most stages side by side in a printed table."""


def markdown(board: pd.DataFrame, lanes: pd.DataFrame | None = None) -> str:
    """Return the board as Markdown, the lanes first."""
    parts = ["\n".join(f"> {note}" for note in notes(board))]
    for lane in () if lanes is None else lane_tables(lanes):
        rows = [["attack", *lane.header], ["---", *("---:" for _ in lane.header)]]
        rows += [[attack, *texts] for attack, texts in lane.lines]
        parts.append(_section(lane, rows))
    for table in tables(board):
        rule = ["---", *("---:" if column.right else "---" for column in table.columns)]
        rows = [["defense", *table.header], rule, *([defense, *texts] for defense, texts in table.lines)]
        parts.append(_section(table, rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(table: Table, rows: list[list[str]]) -> str:
    return "\n".join([f"### {table.title}", "", *markdown_lines(rows), "", f"*{table.caption}*"])


def markdown_lines(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return rows of cells as lines of a Markdown table; the rule below the heading is a row like any other."""
    return ["| " + " | ".join(text.replace("|", r"\|") for text in row) + " |" for row in rows]


def to_csv(board: pd.DataFrame) -> str:
    """Return every column of every cell as CSV."""
    return str(board.to_csv(index=False))


def to_json(board: pd.DataFrame, lanes: pd.DataFrame | None = None) -> str:
    """Return every column of every cell as JSON; what is unknown is null.

    Returns:
        ``{"meta": ..., "cells": [...], "lanes": [...]}``
    """
    columns = dict.fromkeys(CELL_KEYS, "identity")
    columns |= {column.key: column.label for column in COLUMNS} | TABLE_COLUMNS
    meta = {
        "notes": notes(board),
        "columns": columns,
        "lane_columns": LANE_COLUMNS,
        "metrics": {name: spec.description for name, spec in METRICS.items()},
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }
    lines = json.loads(board.to_json(orient="records", double_precision=15))
    lanes = pd.DataFrame() if lanes is None else lanes
    ranked = json.loads(lanes.to_json(orient="records", double_precision=15))
    return json.dumps({"meta": meta, "cells": lines, "lanes": ranked}, indent=1)
