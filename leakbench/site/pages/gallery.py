"""Reconstructions by rule: of every cell the trials of best, median and worst PSNR, beside originals and floor."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from PIL import Image

from leakbench.gallery import DATASETS, IDENTITY, MOST_IMAGES, Entry
from leakbench.keys import DEVELOPMENT
from leakbench.site.data import Data, attack_page, cell_page, slug, task_page
from leakbench.site.page import Asset, Page

_MOST_PIXELS = 4_000_000

FLOOR = "mean_image"
"""The attack whose picture stands for the floor: it claims the same for every victim, and no update moves it."""


def pages(data: Data) -> Iterator[Page | Asset]:
    """Yield the list of tasks with pictures, a page for each, and the pictures."""
    by_task = defaultdict[tuple[str, str], list[list[Entry]]](list)
    for cell in data.pictures:
        if _may_show(cell):
            by_task[(cell[0]["task"], cell[0]["task_hash"])].append(cell)
    rows = {
        tuple(line[key] for key in IDENTITY): cell_page(line["id"])
        for line in data.board[[*IDENTITY, "id"]].to_dict("records")
    }
    listed = []
    for (task, task_hash), cells in sorted(by_task.items()):
        path = f"gallery/{slug(task)}-{slug(task_hash[:8])}.html"
        shown: list[dict[str, Any]] = []
        floor = _floor(cells)
        if floor is not None:
            yield floor[0]
        below = [] if floor is None else [("floor", (floor[0].path, *floor[1]))]
        for cell in cells:
            pictures = []
            for entry in cell:
                sides = []
                for key, words in (("true", "original"), ("recovered", "recovered")):
                    asset = _picture(entry[key])
                    if asset is not None:
                        yield asset[0]
                        sides.append((words, (asset[0].path, *asset[1])))
                if len(sides) == 2:
                    pictures.append({"entry": entry, "sides": [*sides, *(below if cell[0]["attack"] != FLOOR else [])]})
            page = rows.get(tuple(cell[0][key] for key in IDENTITY), attack_page(cell[0]["attack"]))
            shown.append({"cell": cell[0], "pictures": pictures, "page": page})
        groups = [
            {"id": f"d{i}", "defense": label, "cells": list(own)}
            for i, (label, own) in enumerate(groupby(shown, key=lambda item: item["cell"]["defense_label"]))
        ]
        context = {
            "groups": groups,
            "task": task_page(task, task_hash),
            "most": MOST_IMAGES,
            "floor": floor is not None,
        }
        yield Page(path, task, "pictures.html", context)
        listed.append({"path": path, "task": task, "count": len(cells)})
    yield Page("gallery.html", "Gallery of reconstructions", "gallery.html", {"listed": listed})


def _floor(cells: list[list[Entry]]) -> tuple[Asset, tuple[int, int]] | None:
    """Return the picture of `FLOOR` on a task; None where it was not run or claims different things."""
    found = [e for cell in cells for e in cell if e["attack"] == FLOOR and e["defense"] == "none"]
    # Of batches of unlike sizes the strips differ in length only.
    pictures = {entry["recovered"] for entry in found}
    return _picture(pictures.pop()) if len(pictures) == 1 else None


def _may_show(cell: list[Entry]) -> bool:
    """Whether victims may be shown: only those of the public season, of datasets that allow it."""
    return all(e["season"] == DEVELOPMENT.name and e["dataset"] in DATASETS for e in cell)


def _picture(png: bytes) -> tuple[Asset, tuple[int, int]] | None:
    """Return a picture written anew, since it comes from strangers, and its size; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            gray = image.mode == "L"
            plain = image.convert("L" if gray else "RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    file = io.BytesIO()
    plain.save(file, "PNG")
    content = file.getvalue()
    return Asset(f"pictures/{hashlib.sha256(content).hexdigest()[:20]}.png", content), plain.size
