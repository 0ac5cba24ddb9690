"""What defenses cost in accuracy: federated trainings of the same season and data, of one setting for a whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.cohorts import COHORT
from leakbench.board.columns import DEFENSE_KEYS, entry_label, entry_parameters
from leakbench.board.score import plain
from leakbench.board.stats import RESAMPLES, resamples
from leakbench.utility.summary import SETTING, interval

MIN_SEEDS = 3
"""Fewest seeds of a cost: an interval from two is twelve times as wide as their spread."""

JOINED = ("season", "season_commitment", "benchmark_version", "dataset", "dataset_fingerprint")
"""What attacks and trainings have to agree on."""

LIKE = ("architecture", "architecture_params", "sends", "local_steps")
"""By what the training that is most like the attacked tasks is told, what matters most first."""

COST_COLUMNS = {
    "drop": "points of accuracy lost to the undefended training of the same seed, mean over trainings",
    "drop_low": "lower end of its 95% t-interval over seeds",
    "drop_high": "upper end of its 95% interval",
    "accuracy": "mean accuracy on the test split; of a failed training the chance level",
    "utility": "share of the undefended accuracy above chance that is left, in [0, 1]; 0 of a failed training",
    "trainings": "trainings behind it",
    "seeds": "seeds of them; of partitions that have more, or fewer, the fewest",
    "failed_trainings": "those that failed",
    "training": "net and protocol that were trained: of those there are, the most like what was attacked",
    "partitions": "how examples were spread over clients; the mean is over them",
    "other_trainings": "settings of training that are left out, other nets or protocols",
    "no_class_because": "why it is in no class of accuracy, however small its drop; null: it may be",
    "no_utility_because": "why its accuracy is not known well enough to rank it; null: it is",
}
"""The columns of `Costs.of`."""

_NAMES = tuple(key for key in SETTING if key not in (*JOINED, "partition"))
_Key = tuple[Any, ...]


class Costs:
    """What every defense costs in accuracy.

    Args:
        utility: Federated trainings as `leakbench.results.load_utility` returns them; None: none.
    """

    def __init__(self, utility: pd.DataFrame | None) -> None:
        self._trained: dict[_Key, dict[_Key, pd.DataFrame]] = {}
        self._elsewhere: set[_Key] = set()
        if utility is None or utility.empty:
            return
        own = utility[[*DEFENSE_KEYS, "dataset"]].drop_duplicates()
        self._elsewhere = {tuple(map(plain, keys)) for keys in own.itertuples(index=False, name=None)}
        for keys, part in utility.groupby([*JOINED, *_NAMES], dropna=False):
            values = tuple(map(plain, keys))
            self._trained.setdefault(values[: len(JOINED)], {})[values[len(JOINED) :]] = part

    def of(
        self, keys: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """Return the columns of a defense, and its utility by resample of the seeds, (R,), empty where it has none.

        Args:
            keys: Values of `JOINED` and `DEFENSE_KEYS`.
            tasks: What rows say of the tasks that are attacked, by column.
        """
        line: dict[str, Any] = dict.fromkeys(COST_COLUMNS)
        line |= dict.fromkeys(("drop", "drop_low", "drop_high", "accuracy", "utility"), np.nan)
        nothing = np.empty(0)
        if keys["defense"] == COHORT:  # the sum is exact: the model that it trains is the same
            return line | {"drop": 0.0, "drop_low": 0.0, "drop_high": 0.0, "utility": 1.0}, np.ones(RESAMPLES)
        defense = tuple(plain(keys[key]) for key in DEFENSE_KEYS)
        at = self._trained.get(tuple(plain(keys[key]) for key in JOINED), {})
        if not at:
            text = "no federated training with it on this dataset"
            if (*defense, keys["dataset"]) in self._elsewhere:
                text += " in this season and version"
            return line | {"no_utility_because": text}, nothing
        setting = max(at, key=lambda key: (*_fitness(dict(zip(_NAMES, key, strict=True)), at[key], tasks), repr(key)))
        everything = at[setting]
        line |= {"training": _description(dict(zip(_NAMES, setting, strict=True))), "other_trainings": len(at) - 1}
        ids = list(map(repr, everything[["partition", "seed"]].itertuples(index=False, name=None)))
        everything = everything.assign(_training=ids)
        chain = [tuple(map(plain, own)) for own in everything[list(DEFENSE_KEYS)].itertuples(index=False, name=None)]
        part = everything[[own == defense for own in chain]]
        if part.empty:
            return line | {"no_utility_because": "no federated training with it on this dataset"}, nothing
        undefended = set(everything.loc[everything["defense"] == "none", "_training"])
        missing = len(undefended - set(part["_training"]))
        failed = int((part["status"] != "ok").sum())
        line |= {"trainings": len(part), "failed_trainings": failed}
        line |= {"partitions": ", ".join(sorted(map(str, part["partition"].unique())))}
        line["seeds"] = int(part.groupby("partition")["seed"].nunique().min())
        if missing:
            text = f"{missing} of {missing + len(part)} federated trainings with it are missing"
            return line | {"no_utility_because": text}, nothing
        if failed:
            line["no_class_because"] = f"{failed} of {len(part)} federated trainings with it failed"
        unknown = part[part["drop"].isna() | part["utility"].isna()]
        if len(unknown):
            why = unknown["utility_note"].dropna()
            text = f"accuracy lost is not known in {len(unknown)} of {len(part)} federated trainings"
            return line | {"no_utility_because": text + (f", e.g. {why.iloc[0]}" if len(why) else "")}, nothing
        means = part.groupby("seed")[["drop", "utility", "accuracy"]].mean().astype(float)
        line |= {str(name): value for name, value in means.mean().items()}
        line["drop_low"], line["drop_high"] = interval(means["drop"].to_list())
        if line["seeds"] < MIN_SEEDS:
            line["no_utility_because"] = f"fewer than {MIN_SEEDS} seeds"
        drawn = np.concatenate(list(resamples(len(means), "seeds"))) / len(means)
        return line, drawn @ means["utility"].to_numpy()


def _fitness(setting: Mapping[str, Any], part: pd.DataFrame, tasks: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return what is compared of a setting: whether anybody was trained undefended, and then its likeness.

    That is in how many tasks each of `LIKE` is the same, and in how many the rest, added up; then how many there are.
    """
    same = {name: sum(name in task and plain(task[name]) == setting[name] for task in tasks) for name in setting}
    undefended = int((part["defense"] == "none").sum())
    return (int(undefended > 0), *(same[name] for name in LIKE), sum(same.values()), undefended)


def _description(setting: Mapping[str, Any]) -> str:
    net = entry_label(str(setting["architecture"]), entry_parameters(setting["architecture_params"]))
    steps = "" if setting["sends"] == "gradient" else f" of {setting['local_steps']} steps"
    return (
        f"{net}, {setting['sends']}{steps}, B={setting['batch_size']}, {setting['clients']} clients, "
        f"{setting['rounds']} rounds"
    )
