"""Files to start from: each passes `leakbench check` as it is, and says where an author has to write."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Literal

from leakbench.errors import UserError
from leakbench.sources import Kind, sources

Recovers = Literal["labels", "inputs"]

_LABELS = '''"""TODO: what this file is about, in one line."""

from __future__ import annotations

import torch

from leakbench import Attack, Observation, Recovery, register


@register("{name}", version=1)
class {cls}(Attack):
    """TODO: what the attack does, in one sentence.

    As it stands it gives every class a share of the batch by how negative its row of the last layer's weight gradient
    is, which is where a label's own examples pull.

    Sees: TODO (now: one update, the last layer's weight gradient, the batch size).

    Args:
        sharpness: Exponent of the shares; 1 takes them as they are.

    Reference: TODO authors, title, venue, year, arXiv id
    """

    recovers = frozenset({{"labels"}})
    needs = frozenset({{"weights", "batch_size"}})  # a task that grants less gives rows `not_applicable`
    reads = ("head.weight",)  # only what is read is computed and sent

    def __init__(self, *, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness

    def run(self, observation: Observation) -> Recovery:
        """Return counts (T, 1, C): T trials, the batch as a whole, C classes."""
        # A gradient, or the change of weights against it, of unknown scale where the learning rate is withheld.
        rows = observation.difference(observation.update)[f"{{observation.model.head}}.weight"]  # (T, C, features)
        pull = (-rows.sum(2)).clamp(min=0)  # (T, C)
        pull = pull / pull.amax(1, keepdim=True).clamp(min=torch.finfo(pull.dtype).tiny)
        shares = pull**self.sharpness
        total = shares.sum(1, keepdim=True)
        uniform = torch.full_like(shares, 1 / shares.shape[1])
        shares = torch.where(total > 0, shares / total.clamp(min=torch.finfo(shares.dtype).tiny), uniform)
        labels = observation.total_inputs
        counts = (shares * labels).floor().long()
        # The labels that rounding left over go to the classes of the greatest remainders.
        left = labels - counts.sum(1, keepdim=True)
        order = (shares * labels - counts).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return Recovery(label_counts=(counts + (order < left).long())[:, None])
'''

_INPUTS = '''"""TODO: what this file is about, in one line."""

from __future__ import annotations

from leakbench import register
from leakbench.inversion import Adam, Cosine, Inversion, InversionAttack, TotalVariation


@register("{name}", version=1)
class {cls}(InversionAttack):
    """TODO: what the attack does, in one sentence.

    As it stands it looks for inputs whose gradient points the way of the update, with a prior on smooth images. Other
    parts to choose from are in `leakbench.inversion`; an attack of another kind derives from `leakbench.Attack`.

    Sees: TODO (now: one update, the model; labels where granted, else those of the label attack `labels`).

    Args:
        steps: Gradient evaluations per restart.
        tv: Weight of the total variation.

    Reference: TODO authors, title, venue, year, arXiv id
    """

    def __init__(self, *, steps: int = 300, tv: float = 1e-3) -> None:
        self.steps = steps
        self.tv = tv
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv),),
            optimiser=Adam(lr=0.1, sign="hard", schedule="steps"),
            steps=steps,
            restarts=1,
        )
'''

_DEFENSE = '''"""TODO: what this file is about, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leakbench import Defense, UserError, register

if TYPE_CHECKING:
    from torch import Tensor

    from leakbench import DefenseContext


@register("{name}", version=1)
class {cls}(Defense):
    """TODO: what the defense does, in one sentence.

    As it stands it adds to every number sent a share of normal noise as large as that tensor's root mean square.

    Acts on: TODO (now: the update).

    Args:
        share: Standard deviation of the noise, in root mean squares of each tensor.

    Reference: TODO authors, title, venue, year, arXiv id
    """

    acts_on = frozenset({{"update"}})
    strength = ("share", "higher")  # what is swept, and which way is stronger
    neutral = {{"share": 0.0}}  # with these parameters nothing changes
    draws = "normal noise, one number per coordinate"  # empty for a deterministic defense
    likelihood = "simulated"
    # Before a defense is ranked it has to face these: attacks that know it, which read the client's defense, as these
    # three do, or one of your own. Those of a suite that do not read it are no adaptive attacks.
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, share: float = 0.1) -> None:
        if share < 0:
            raise UserError(f"{name}: share: expected at least 0, got {{share}}; write {name}(share=0.1)")
        self.share = share

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Return what is sent, tensors (T, ...) by name: T trials, never mixed."""
        sent = {{}}
        for name, value in update.items():
            size = value.flatten(1).square().mean(1).sqrt().view(-1, *(1,) * (value.dim() - 1))
            # Streams are named by the tensor, so that its noise does not depend on what else is sent.
            sent[name] = value + self.share * size * ctx.random.at(name).randn(*value.shape[1:]).to(value)
        return sent
'''


def new_entry(kind: Kind, name: str, out: Path | None = None, *, recovers: Recovers = "labels") -> Path:
    """Write a skeleton and return its path.

    Args:
        kind: ``attack`` or ``defense``.
        name: Registered name, in snake_case.
        out: File to write; None: ``name.py`` in the working directory.
        recovers: What the attack is to recover.

    Raises:
        UserError: The name is taken or no identifier, the file is there already, or cannot be written.
    """
    if not 2 <= len(name) <= 49:
        raise UserError(f"name {name!r}: expected 2 to 49 characters, got {len(name)}; e.g. pruning_aware")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"name {name!r}: expected snake_case (letters, digits, _), no word of Python; e.g. pruning_aware"
        )
    if name in sources(kind):
        raise UserError(f"{kind} {name!r} exists ({sources(kind).get(name).path.name}); choose another name")
    path = out if out is not None else Path(f"{name}.py")
    if path.suffix != ".py":
        raise UserError(f"--out {path}: expected a Python file; write --out {name}.py")
    template = _DEFENSE if kind == "defense" else _INPUTS if recovers == "inputs" else _LABELS
    text = template.format(name=name, cls="".join(part.capitalize() for part in name.split("_")))
    made = False
    try:
        with path.open("x", encoding="utf-8") as file:
            made = True
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists; give another name with --out, or remove it first") from None
    except OSError as error:
        if made:  # a full disk lets a file be made but not written
            path.unlink(missing_ok=True)
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); use another --out") from None
    return path
