"""Measures under noise: Fisher information, bounds of the declared mechanism, audits. Data only, no torch here."""

from __future__ import annotations

from leakbench.measures.catalogue import MEASURES, MeasureSpec, Quantity

_NOISE = "sigma: the declared standard deviation on what is sent, divided by sqrt(rounds)"
_UNBIASED = "unbiased attackers only"
_DECLARED = frozenset({"mechanism"})

for _spec in (
    MeasureSpec(
        name="fisher",
        module="fisher",
        version=1,
        summary="Fisher information about the images under the noise that the defense declares.",
        quantities=(
            Quantity(
                "fil_eta",
                "proved_bound",
                "1/intensity",
                True,
                f"s_1 / sigma, s_1 approached from below: the deviation of some direction is at least 1 / eta, "
                f"{_UNBIASED}; {_NOISE}",
            ),
            Quantity(
                "dfil",
                "proved_bound",
                "1/intensity^2",
                True,
                f"||J_l||_F^2 / (d sigma^2): the mean squared error per pixel is at least 1 / dfil, {_UNBIASED}; of a "
                "layer: if nothing else were sent; relative standard error at most sqrt(2/probes)",
            ),
            Quantity(
                "mse_bound_unbiased",
                "proved_bound",
                "intensity^2",
                False,
                f"1 / dfil, at most 1, {_UNBIASED}; estimated from as many probes as dfil",
            ),
        ),
        cost="probes x 1.2 to 1.6 gradients for all layers, and iterations x 3",
        source="Hannun, Guo, van der Maaten 2021, arXiv 2102.11673; Guo, Karrer, Chaudhuri, van der Maaten 2022, arXiv "
        "2201.12383",
        params={"probes": 64, "iterations": 32},
        needs=_DECLARED,
    ),
    MeasureSpec(
        name="reference_fisher",
        module="fisher",
        version=1,
        summary="The same as if a noise of given relative size were added: compares, bounds nothing.",
        quantities=(
            Quantity("reference_fil_eta", "proxy", "1/intensity", True, "s_1 / sigma, sigma the reference noise"),
            Quantity("reference_dfil", "proxy", "1/intensity^2", True, "||J_l||_F^2 / (d sigma^2)"),
            Quantity("reference_mse", "proxy", "intensity^2", False, "d sigma^2 / ||J||_F^2, at most 1"),
        ),
        cost="as fisher",
        source="as fisher; the reference noise, reference_noise root mean squares of the update, is ours",
        params={"probes": 64, "iterations": 32, "reference_noise": 1e-3},
    ),
    MeasureSpec(
        name="cramer_rao",
        module="fisher",
        version=1,
        summary="Least mean squared error of unbiased attackers, from the whole Jacobian of few pixels.",
        quantities=(
            Quantity(
                "mse_bound_cramer_rao",
                "proved_bound",
                "intensity^2",
                False,
                f"sigma^2 tr((J^T J)^-1) / d, {_UNBIASED}; at most 1, also where J^T J is singular",
            ),
        ),
        cost="d x 1.2 to 1.6 gradients",
        source="Cramer-Rao",
        params={"exact": 256},
        needs=_DECLARED,
    ),
    MeasureSpec(
        name="bayes_cramer_rao",
        module="fisher",
        version=1,
        summary="Least mean squared error of any attacker, biased ones too, if images came from a Gaussian prior.",
        quantities=(
            Quantity(
                "mse_bound_bayes",
                "proved_bound",
                "intensity^2",
                False,
                "1 / (mean dfil + tr(Sigma^-1) / d), Sigma the Ledoit-Wolf covariance of auxiliary images; assumes "
                "that prior, which real images do not have",
            ),
            Quantity(
                "mse_bound_prior",
                "proved_bound",
                "intensity^2",
                None,
                "d / tr(Sigma^-1): the same without any update; what leaks is the difference to it",
            ),
        ),
        cost="as fisher, without iterations",
        source="van Trees; for gradients Maeng, Guo, Kariyappa, Suh 2023, arXiv 2305.04146; the prior is ours",
        params={"probes": 64, "train": 256},
        fitted=True,
        needs=_DECLARED,
    ),
    MeasureSpec(
        name="robustness",
        module="robustness",
        version=1,
        summary="What no attacker exceeds against the declared clipping and noise, whatever it knows.",
        quantities=(
            Quantity(
                "rero_gamma_example",
                "proved_bound",
                "1",
                True,
                "Phi(Phi^-1(kappa) + mu / 2): success in reconstructing one example, all others known, where the best "
                "blind guess has kappa; mu = example / sigma",
            ),
            Quantity("rero_gamma_update", "proved_bound", "1", True, "the same of all examples, mu = update / sigma"),
            Quantity(
                "attribute_accuracy_bound",
                "proved_bound",
                "1",
                True,
                "Phi(mu / 2), mu = update / sigma: whether the clients' batches have an attribute, even odds",
                bounds="inference_accuracy",
                target="attribute",
            ),
            Quantity(
                "membership_accuracy_bound",
                "proved_bound",
                "1",
                True,
                "Phi(mu / 2), mu = example / sigma: whether one example is in the batch, even odds",
                bounds="inference_accuracy",
                target="membership",
            ),
            Quantity(
                "epsilon",
                "proved_bound",
                "1",
                True,
                "of (epsilon, delta)-DP where one example is replaced, from the curve of mu-GDP",
                bounds="one_run_epsilon",
            ),
        ),
        cost="none",
        source="Hayes, Mahloujifar, Balle 2023, arXiv 2302.07225; Dong, Roth, Su 2019, arXiv 1905.02383",
        params={"kappa": 0.1, "delta": 1e-5},
        needs=_DECLARED,
    ),
    MeasureSpec(
        name="empirical_epsilon",
        module="audit",
        version=1,
        summary="Epsilon from below: guesses which examples were used, with canaries in place of one another.",
        quantities=(
            Quantity(
                "one_run_epsilon",
                "lower_bound",
                "1",
                True,
                "95% lower limit from the most confident guesses over all canaries of all trials",
            ),
            Quantity(
                "multi_run_epsilon",
                "lower_bound",
                "1",
                True,
                "ln((hits - delta) / alarms) of Clopper-Pearson limits over trials, one canary each",
            ),
            Quantity(
                "gdp_run_epsilon",
                "proxy",
                "1",
                True,
                "the same rates read as those of a Gaussian mechanism: a lower limit for such, an extrapolation else",
            ),
            Quantity("audit_accuracy", "lower_bound", "1", True, "share of the canaries that are guessed right"),
        ),
        cost="2 per-example gradients of every canary, and one update",
        source="Steinke, Nasr, Jagielski 2023, arXiv 2305.08846; Nasr et al. 2023, arXiv 2302.07956",
        params={"delta": 1e-5, "guesses": 0.5, "train": 256},
        fitted=True,
    ),
):
    MEASURES.register(_spec.name, _spec)
