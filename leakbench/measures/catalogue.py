"""Which measures there are: what each tells, in which unit, how sure it is, what it costs. Data only, no torch here.

Three kinds of numbers never share a column: what an attack achieved (``lower_bound`` on what leaks), local numbers
without an attacker (``proxy``, no bound at all), and what no attacker can exceed (``proved_bound``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from leakbench.entries import Description, EntrySpec, Value, merge_params, parse_expression
from leakbench.errors import UserError
from leakbench.registry import Registry

MeasureKind = Literal["lower_bound", "proxy", "proved_bound"]


@dataclass(frozen=True)
class Quantity:
    """One number that a measure gives.

    Args:
        name: Value of the column ``quantity``.
        kind: What sort of number it is.
        unit: ``1`` for one without a unit.
        more_leaks: Whether a greater value means that more leaks; None where neither way does.
        description: Formula; J_l is the Jacobian of layer l's part of the update with respect to the private images.
        bounds: Metric that no attack on the same task may exceed, in the mean over trials; only of a proved bound.
    """

    name: str
    kind: MeasureKind
    unit: str
    more_leaks: bool | None
    description: str
    bounds: str | None = None


@dataclass(frozen=True)
class MeasureSpec:
    """One measure.

    Args:
        name: Name in suites and rows, and of the function in ``module``.
        module: Module of `leakbench.measures`.
        version: Raised by every change that can move a number.
        summary: One line.
        quantities: What it gives.
        cost: In gradients of one trial, or what else dominates.
        source: Authors, year, arXiv id.
        params: Parameters with their defaults.
        fitted: Whether it is fitted over all trials of a cell, which are then one block.
        needs: ``attribute`` where the task must ask for one; ``mechanism`` where the defense must declare its noise.
    """

    name: str
    module: str
    version: int
    summary: str
    quantities: tuple[Quantity, ...]
    cost: str
    source: str
    params: dict[str, Value] = field(default_factory=dict)
    fitted: bool = False
    needs: frozenset[str] = frozenset()


MEASURES: Registry[MeasureSpec] = Registry("measure")
"""Every measure."""

DEFAULT = ("sensitivity",)
"""What `leakbench measure` computes for a suite that names none."""


def resolve_measure(text: str) -> EntrySpec:
    """Return the measure that an expression names, in the form in which jobs hold entries.

    Raises:
        UserError: It is malformed, several measures at once, or has an unknown name or parameter.
    """
    calls = parse_expression(text)
    if len(calls) != 1:
        raise UserError(f"measure {text!r}: expected one measure, got {len(calls)}; see: leakbench list measures")
    spec = MEASURES.get(calls[0].ref)
    description = Description(
        kind="measure",
        name=spec.name,
        class_name=spec.name,
        version=spec.version,
        reference=spec.source,
        summary=spec.summary,
        reads=("*",),
        params=spec.params,
    )
    return EntrySpec(description, merge_params(description, calls[0].params), None)


# --- what there is ----------------------------------------------------------------------------------------------------

from leakbench.measures import specs_fitted  # noqa: E402, F401  registers more; it needs the names above
