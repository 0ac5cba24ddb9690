"""leakbench: benchmark of gradient and model leakage in federated learning.

The public names below load on first use, so that ``import leakbench`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakbench.api import evaluate as evaluate
    from leakbench.attack import Attack as Attack
    from leakbench.attack import Recovery as Recovery
    from leakbench.defense import Defense as Defense
    from leakbench.defense import DefenseContext as DefenseContext
    from leakbench.entry import register as register
    from leakbench.errors import LeakbenchError as LeakbenchError
    from leakbench.errors import NotApplicable as NotApplicable
    from leakbench.errors import NotGranted as NotGranted
    from leakbench.errors import UserError as UserError
    from leakbench.federation.gradients import per_trial_gradients as per_trial_gradients
    from leakbench.knowledge import Knowledge as Knowledge
    from leakbench.mechanism import Mechanism as Mechanism
    from leakbench.models.functional import Model as Model
    from leakbench.models.functional import layer_inputs as layer_inputs
    from leakbench.observation import Cohort as Cohort
    from leakbench.observation import Observation as Observation
    from leakbench.suites import load_suite as load_suite
    from leakbench.suites import load_task as load_task
    from leakbench.tasks import Task as Task

_HOMES = {
    "Attack": "leakbench.attack",
    "Cohort": "leakbench.observation",
    "Defense": "leakbench.defense",
    "DefenseContext": "leakbench.defense",
    "Knowledge": "leakbench.knowledge",
    "LeakbenchError": "leakbench.errors",
    "Mechanism": "leakbench.mechanism",
    "Model": "leakbench.models.functional",
    "NotApplicable": "leakbench.errors",
    "NotGranted": "leakbench.errors",
    "Observation": "leakbench.observation",
    "Recovery": "leakbench.attack",
    "Task": "leakbench.tasks",
    "UserError": "leakbench.errors",
    "evaluate": "leakbench.api",
    "layer_inputs": "leakbench.models.functional",
    "load_suite": "leakbench.suites",
    "load_task": "leakbench.suites",
    "per_trial_gradients": "leakbench.federation.gradients",
    "register": "leakbench.entry",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'leakbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
