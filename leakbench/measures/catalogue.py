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

ALL = "all"
"""Stands for the whole update where a layer is named."""

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
        bounds: Metric that no attack on the same task may exceed in the mean over trials, or another measure's lower
            bound; only of a proved bound.
        target: Target of the tasks where it does; None for any.
    """

    name: str
    kind: MeasureKind
    unit: str
    more_leaks: bool | None
    description: str
    bounds: str | None = None
    target: str | None = None


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
        needs: ``attribute`` where the task must ask for one; ``mechanism`` where the defense must declare its noise;
            ``shared_model`` where updates of different trials are compared.
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
    params = merge_params(description, calls[0].params)
    for name, value in params.items():
        _check(f"measure {spec.name}: {name}", name, value, spec.params[name])
    return EntrySpec(description, params, None)


def _check(where: str, name: str, value: Value, default: Value) -> None:
    """Check a parameter: counts are at least 1, other numbers above 0, chances below 1, words out of the default's."""
    if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, int) and value < 1:
        raise UserError(f"{where}: expected at least 1, got {value}; write {name}={default}")
    if isinstance(default, float) and isinstance(value, float):
        most = 1.0 if name in ("kappa", "delta") else float("inf")
        if not 0 < value < most:
            limit = f" and less than {most:g}" if most < float("inf") else ""
            raise UserError(f"{where}: expected more than 0{limit}, got {value}; write {name}={default}")
    if isinstance(default, str) and isinstance(value, str):
        known = default.split(",")
        for word in (word.strip() for word in value.split(",")):
            if word not in known:
                raise UserError(f"{where}: expected some of {default}, got {word!r}; write {name}={default!r}")


# --- what there is ----------------------------------------------------------------------------------------------------

_CURVATURE = "J_l = dg_l/dx: Jacobian of layer l's part of the update; s_i its singular values, d pixels, P_l numbers"

for _spec in (
    MeasureSpec(
        name="sensitivity",
        module="sensitivity",
        version=1,
        summary="How much each layer changes with the images: Frobenius norm of its Jacobian, in three scales.",
        quantities=(
            Quantity("gradient_norm", "proxy", "1", True, "||g_l||, what any proxy has to beat"),
            Quantity(
                "sensitivity_relative",
                "proxy",
                "1",
                True,
                "||J_l||_F ||x|| / ||g_l||: change per change; relative standard error at most 1/sqrt(2 probes)",
            ),
            Quantity(
                "sensitivity_rms",
                "proxy",
                "1/intensity",
                True,
                "||J_l||_F / sqrt(P_l d): root mean square entry; relative standard error at most 1/sqrt(2 probes)",
            ),
            Quantity(
                "sensitivity_share",
                "proxy",
                "1",
                None,
                "||J_l||_F^2 / sum over layers: where the change is; each term's relative standard error is at most "
                "sqrt(2/probes)",
            ),
        ),
        cost="probes x 1.2 to 1.6 gradients, all layers at once",
        source="after Mo et al. 2021, arXiv 2105.13929; normalisation and estimator are ours",
        params={"probes": 64},
    ),
    MeasureSpec(
        name="graddefense_sensitivity",
        module="sensitivity",
        version=1,
        summary="The layer sensitivity of the GradDefense code: a product with ones, no norm of the Jacobian.",
        quantities=(
            Quantity(
                "graddefense_sensitivity",
                "proxy",
                "1/intensity",
                True,
                "mean over examples of ||1^T J_l||; rows of J_l cancel, so that it estimates none of its norms",
            ),
        ),
        cost="1.2 to 1.7 gradients per layer",
        source="Wang et al., GradDefense, INFOCOM 2022, as coded in plato",
    ),
    MeasureSpec(
        name="spectrum",
        module="spectrum",
        version=1,
        summary="What the singular values of each layer's Jacobian say: worst direction, rank, information.",
        quantities=(
            Quantity("spectral_norm", "proxy", "1/intensity", True, "s_1; " + _CURVATURE),
            Quantity("effective_rank", "proxy", "pixels", True, "exp(entropy of s_i^2 / sum s^2)"),
            Quantity(
                "numerical_rank",
                "proxy",
                "1",
                True,
                "share of the d pixel directions with s_i > 1e-3 s_1; rough where d is above `exact`",
            ),
            Quantity("lavp_l2", "proxy", "1/intensity^2", True, "2 s_1^2: greatest curvature of ||g(x') - g||^2 at x"),
            Quantity(
                "lavp_cosine",
                "proxy",
                "1/intensity^2",
                True,
                "greatest curvature of 1 - cos(g(x'), g) at x: of J^T (I - g g^T / ||g||^2) J / ||g||^2",
            ),
            Quantity(
                "gaussian_information",
                "proxy",
                "bit",
                True,
                "1/2 sum log2(1 + prior^2 s_i^2 / sigma^2): linearised at x, sigma the reference noise on the update",
            ),
            Quantity(
                "recoverable_fraction",
                "proxy",
                "1",
                True,
                "1 - 1/d sum 1 / (1 + prior^2 s_i^2 / sigma^2): share of the prior variance that a linear attacker "
                "removes",
            ),
        ),
        cost="up to `exact` pixels d products for all layers, more where rows do not fit; beyond, iterations x "
        "(probes + 1) x 3 gradients per layer",
        source="LAVP: Hong et al. 2023, arXiv 2312.12488; quadrature: Ubaru, Chen, Saad 2017; reference noise is ours",
        params={"exact": 1024, "iterations": 32, "probes": 2, "prior": 0.25, "noise": 1e-3},
    ),
    MeasureSpec(
        name="i2f",
        module="inversion_influence",
        version=1,
        summary="How far a defense's perturbation moves an ideal reconstruction, to first order.",
        quantities=(
            Quantity(
                "i2f",
                "proxy",
                "intensity",
                False,
                "||(J^T J + damping s_1^2 I)^-1 J^T delta||, delta = defended - undefended update, J undefended",
            ),
            Quantity(
                "i2f_lower", "proxy", "intensity", False, "||J^T delta|| / s_1^2, at most (1 + damping) times i2f"
            ),
        ),
        cost="at most iterations + 32 products with J and with its transpose",
        source="Zhang, Hong, Deng, Mahdavi, Zhou 2023, arXiv 2309.13016; relative damping is ours",
        params={"damping": 1e-3, "iterations": 100},
    ),
    MeasureSpec(
        name="latent_sensitivity",
        module="latent",
        version=1,
        summary="Whether a layer reacts more to the attribute than to other changes of the images.",
        quantities=(
            Quantity(
                "latent_sensitivity",
                "proxy",
                "1",
                True,
                "||J_l u|| / E||J_l v||: u is the mean auxiliary image with the attribute minus that without, v white "
                "noise, both put on every image and of length 1; 1 is no more than noise",
            ),
            Quantity(
                "latent_specificity",
                "proxy",
                "1",
                True,
                "the same with v the difference of means of random auxiliary groups, as smooth as images are; 1 is no "
                "more than any difference of images",
            ),
        ),
        cost="(2 probes + 1) x 1.2 to 1.6 gradients, all layers at once",
        source="after Mo et al. 2020, arXiv 2010.08762; the construction is ours",
        params={"probes": 32, "train": 256},
        needs=frozenset({"attribute"}),
    ),
):
    MEASURES.register(_spec.name, _spec)

from leakbench.measures import specs_fitted, specs_mechanism  # noqa: E402, F401  register more; need the names above
