"""Boards of attacks: a table per lane and stage, then every task of the lane with its best attack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from leakbench.board.lanes import EXACT, LaneTable
from leakbench.board.score import group_ids
from leakbench.metrics import headline
from leakbench.site.charts import Interval, forest
from leakbench.site.checking import LANE_TITLES
from leakbench.site.data import Data, attack_page, cell_page, slug, task_page
from leakbench.site.page import Page
from leakbench.site.profiles import profile
from leakbench.site.table import Chart, Column, Line, Table, Value, digits, interval, number, places, rank, whole


class Board(NamedTuple):
    """A page of lanes."""

    path: str
    short: str
    title: str
    lanes: tuple[str, ...]
    targets: tuple[str, ...]
    text: str


BOARDS = (
    Board(
        "boards/labels.html",
        "Labels",
        "Label attacks",
        ("passive_labels", "passive_update"),
        ("labels",),
        "Which labels were in the private batch, and how often? Scores are instance recall; the edge is how much of "
        "the way from chance to everything an attack comes.",
    ),
    Board(
        "boards/images.html",
        "Images",
        "Image attacks",
        ("passive_images", "passive_update", "legacy_upper_bound"),
        ("inputs",),
        "What did the private images look like? Scores are PSNR after matching; the edge is the gain over the best "
        "floor (a random image, the dataset's mean, ...) of the same victim.",
    ),
    Board(
        "boards/aggregation.html",
        "Aggregation",
        "Secure aggregation and malicious servers",
        ("aggregate", "malicious_server"),
        ("labels", "inputs", "attribute", "membership"),
        "Many clients behind one sum, and servers that plant models. Beside what is recovered stands what a client "
        "would notice.",
    ),
    Board(
        "boards/inference.html",
        "Inference",
        "Attributes and membership",
        ("inference",),
        ("attribute", "membership"),
        "Does a client's data hold examples with an attribute, or a given example? One fair coin per trial; chance is "
        "one half.",
    ),
)
"""Every board of attacks."""

DRAWN = 16
"""Most attacks of a chart of edges."""


def pages(data: Data) -> Iterator[Page]:
    """Yield one page per board."""
    for board in BOARDS:
        tables = [lane_table(data, found, lane_id(found)) for found in of_board(data, board)]
        listed = _tasks(data, board)
        context = {
            "intro": [board.text],
            "tables": [*tables, *([listed] if listed.lines else [])],
            "empty": "No rows of this board yet; run a suite that has such tasks, for instance: leakbench run quick",
        }
        yield Page(board.path, board.title, context=context)


def of_board(data: Data, board: Board) -> list[LaneTable]:
    """Return the tables of a board."""
    return [
        table
        for table in data.lane_tables
        if table.lines[0]["lane"] in board.lanes and table.lines[0]["target"] in board.targets
    ]


def lane_anchor(line: Any) -> str:
    """Return where on an attack's page the cells behind its line of a lane are."""
    keys = ("season", "benchmark_version", "lane", "target", "stage")
    return slug("-".join(str(line[key]) for key in keys) + ("-demo" if line["demonstration"] else ""))


def lane_id(found: LaneTable) -> str:
    """Return the name of a lane's table in its page and in permalinks."""
    line = found.lines[0]
    keys = ("lane", "target", "stage", "suite", "season", "benchmark_version")
    name = "-".join([*(str(line[key]) for key in keys), str(line["season_commitment"])[:8]])
    return slug(name + ("-demo" if line["demonstration"] else ""))


def lane_title(line: Any) -> str:
    """Return a lane, target, stage and suite in words."""
    demonstration = ", demonstration (never ranked)" if line["demonstration"] else ""
    lane = LANE_TITLES.get(line["lane"], line["lane"])
    suite = f", suite {line['suite']}" if line.get("suite") else ""  # cells are of several
    return f"{lane}, {line['target']}, stage {line['stage']}{suite}{demonstration}, season {line['season']}"


def lane_table(data: Data, found: LaneTable, name: str, most: int | None = None) -> Table:
    """Return the table of a lane; with ``most``, only its first lines, without charts and comparison."""
    first = found.lines[0]
    target = str(first["target"])
    decimals, spec = places(target), headline(target)
    gain = target == "inputs"
    stealth = any(pd.notna(line["detected"]) for line in found.lines)
    columns = [
        Column("attack"),
        Column("gain over floor" if gain else "advantage over chance", True, note="dB, higher is better, [95%]" if gain
               else "1 is everything, higher is better, [95%]"),
        Column("group", True, note="1 is best; ties share it"),
        Column(spec.name.replace("_", " "), True, note=spec.unit if spec.unit != "1" else "share"),
        Column("floor" if gain else "chance", True),
        Column(EXACT[target].replace("_", " "), True, note="mean"),
        *([Column("detected", True, note="share of trials, lower is stealthier")] if stealth else []),
        Column("tasks", True, note="covered of all"),
    ]  # fmt: skip
    lines = []
    for line in found.lines[:most]:
        page = attack_page(line["attack"])
        behind = f"{page}#{lane_anchor(line)}"
        # The edge counts every task, what stands beside it only those with a result.
        part = f"of its {line['covered']} task{'' if line['covered'] == 1 else 's'}"
        part = part if 0 < line["covered"] < line["tasks"] else ""
        values = [
            Value(line["attack_label"], href=page),
            interval(line["edge"], line["edge_low"], line["edge_high"], decimals, behind),
            rank(line, behind),
            number(line["mean"], decimals, behind)._replace(extra=part),
            number(line["reference"], decimals, behind),
            number(line["exact"], 2, behind),
            *([number(line["detected"], 2, behind)] if stealth else []),
            Value(f"{line['covered']}/{line['tasks']}", line["covered"], behind, parts={"of": float(line["tasks"])}),
        ]
        group = 0 if pd.isna(line["rank_group"]) else int(line["rank_group"])
        lines.append(Line(values, _key(line), group))
    detectable = found.lines[0]["detectable"]
    notes = [
        f"Minimum detectable difference: {digits(detectable, decimals)} (80% power, 5% level): smaller gaps between "
        "attacks are not told apart by these tasks and trials."
        if pd.notna(detectable)
        else "One attack: nothing to tell apart.",
        "Intervals, groups and ranks: one bootstrap over victims and tasks. Attacks of one group cannot be told from "
        "its leader. In the edge, tasks on which an attack did not run count as chance or floor; what stands right of "
        "its group is a mean over those on which it did, so where lines cover unlike tasks only edges can be compared.",
    ]
    if most is not None:
        return Table(name, lane_title(first), columns, lines, notes[:1])
    ran = [line for line in found.lines if pd.notna(line["rank_group"])]
    unit = "gain over the floor, dB" if gain else "advantage over chance"
    edges = forest(
        f"{name}-chart",
        f"{lane_title(first)}: edge of every attack",
        unit,
        [Interval(line["attack_label"], line["edge"], line["edge_low"], line["edge_high"]) for line in ran[:DRAWN]],
        "the floor" if gain else "chance",
    )
    most_drawn = f"The {DRAWN} first attacks" if len(ran) > DRAWN else "Every attack"
    charts = [Chart(edges, f"{most_drawn}: mean edge over all tasks with its 95% interval.")] if ran else []
    if ran and (profiles := profile(name, data.board, found, "dB" if gain else "in edge")):
        charts.append(profiles)
    return Table(name, lane_title(first), columns, lines, notes, True, _pairs(found, ran, decimals), charts)


def _key(line: Any) -> str:
    return slug(f"{line['attack_label']} v{line['attack_version']} {str(line['attack_source_sha256'])[:6]}")


def _pairs(found: LaneTable, ran: list[Any], decimals: int) -> dict[str, str]:
    pairs = {}
    for i, a in enumerate(ran):
        for j, b in enumerate(ran):
            if i < j:
                low, high = found.low[i, j], found.high[i, j]
                verdict = "can be told apart" if low > 0 or high < 0 else "cannot be told apart"
                gap = digits(a["edge"] - b["edge"], decimals)
                text = f"{a['attack_label']} minus {b['attack_label']}: {gap} "
                text += f"[{digits(low, decimals)}, {digits(high, decimals)}], {verdict}"
                pairs[f"{_key(a)} {_key(b)}"] = text
    return pairs


def _tasks(data: Data, board: Board) -> Table:
    cells = data.board
    own = cells[cells["target"].isin(list(board.targets)) & (cells["defense"] == "none")]
    known = own["lane"].isin(list(board.lanes))
    if board.lanes[0] not in ("aggregate", "inference"):
        known |= own["lane"].isna()
    elif board.lanes[0] == "inference":
        known |= own["lane"].isna() & own["target"].isin(["attribute", "membership"])
    own = own[known]
    lines = []
    for _, table in own.groupby(group_ids(own, ("season", "task", "task_hash", "checkpoint")), sort=False):
        tried = table[table["n"] > 0]
        first = (tried if len(tried) else table).iloc[0]
        target = first["target"]
        here = cell_page(first["id"])
        edge = "gain" if target == "inputs" else "advantage"
        page = task_page(first["task"], first["task_hash"])
        lines.append(
            Line(
                [
                    Value(first["task"], href=page, style="wide"),
                    Value("–" if pd.isna(first["lane"]) else first["lane"]),
                    Value(first["dataset"]),
                    Value(first["architecture"]),
                    Value(first["stage"]),
                    whole(first["batch_size"]),
                    Value(first["attack_label"], href=attack_page(first["attack"])),
                    interval(first["mean"], first["ci_low"], first["ci_high"], places(target), here),
                    number(first["reference"], places(target), here),
                    number(first[edge], places(target), here),
                    number(first["detectable"], places(target), page),
                    whole(len(table), page),
                ],
                slug(f"{first['task']} {first['task_hash'][:8]}"),
            )
        )
    columns = [
        Column("task"), Column("lane", choose=True), Column("dataset", choose=True),
        Column("architecture", choose=True), Column("stage", choose=True), Column("batch", True),
        Column("best attack", choose=True),
        Column("its score", True, note="[95%]"), Column("chance or floor", True), Column("edge", True),
        Column("detectable", True, note="difference"), Column("attacks", True),
    ]  # fmt: skip
    return Table("tasks", "Every task, undefended, and the best attack on it", columns, lines, compare=True)
