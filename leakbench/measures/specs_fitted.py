"""Measures that are fitted over trials: V-information and subspace distance. Data only, no torch here."""

from __future__ import annotations

from leakbench.measures.catalogue import MEASURES, MeasureSpec, Quantity

_XU = "usable information: Xu et al. 2020, arXiv 2002.10689; on gradients: Mo et al. 2021, arXiv 2105.13929"

_RUNGS = {
    "logistic": "logistic regression on a 2,048-number sketch of g_l's direction and its log norm; L2 by 5-fold CV",
    "forest": "random forest on |g_l| / ||g_l||, greatest over kernel positions; 100 trees, leaf 5, split 5",
    "mlp": "MLP 256-64 on 128 principal coordinates of sketch and |g_l|",
    "conv": "32 kernels over the outputs of the weight gradient, sketched to at most 4,096 numbers, then 64 units",
}

for _spec in (
    MeasureSpec(
        name="v_information",
        module="v_information",
        version=1,
        summary="Bits about the attribute that families of classifiers get from each layer, on held-out trials.",
        quantities=(
            *(
                Quantity(
                    f"v_information_{name}",
                    "lower_bound",
                    "bit",
                    True,
                    f"1 bit of a fair coin less the cross-entropy on the victims: {rung}; Platt-calibrated",
                )
                for name, rung in _RUNGS.items()
            ),
            Quantity(
                "v_information",
                "lower_bound",
                "bit",
                True,
                "that of the rung which is best on the calibration rows; raw, so chance may make it negative",
            ),
        ),
        cost="train + T gradients in all; then 2 to 10 s per layer for train=512",
        source=f"{_XU}; ladder after Melis et al. 2019, arXiv 1805.04049 and Nasr et al. 2019, arXiv 1812.00910",
        params={"train": 512, "families": ",".join(_RUNGS)},
        fitted=True,
        needs=frozenset({"attribute", "shared_model"}),
    ),
    MeasureSpec(
        name="v_information_original",
        module="v_information_original",
        version=1,
        summary="Bits per dimension about the images that learned inverters get from each layer, on held-out trials.",
        quantities=(
            Quantity(
                "v_information_original_ridge",
                "lower_bound",
                "bit/dim",
                True,
                "0.5 log2(MSE_mean / MSE_attack) as Gaussian log-likelihood ratio, variances of the calibration rows; "
                "target: images sorted by label, then brightness; ridge regression on the sketch and |g_l|",
            ),
            Quantity(
                "v_information_original_mlp",
                "lower_bound",
                "bit/dim",
                True,
                "the same with an MLP 256-64 from 128 principal coordinates of g_l to 64 of the images",
            ),
            Quantity(
                "v_information_original",
                "lower_bound",
                "bit/dim",
                True,
                "that of the inverter which is best on the calibration rows; may be negative by chance",
            ),
        ),
        cost="train + T gradients in all; then about 1 s per layer for train=512",
        source=f"{_XU}; estimator ours",
        params={"train": 512},
        fitted=True,
        needs=frozenset({"shared_model"}),
    ),
    MeasureSpec(
        name="subspace_distance",
        module="subspace",
        version=1,
        summary="How far updates with and without the attribute span different subspaces, against random relabelings.",
        quantities=(
            Quantity(
                "subspace_distance",
                "proxy",
                "1",
                None,
                "||principal angles of the two groups' top-k subspaces|| / (sqrt(k) pi / 2); says more about P_l / n "
                "than about leakage, so compare z instead",
            ),
            Quantity("subspace_z", "proxy", "1", True, "(distance - mean) / std over random relabelings"),
            Quantity("subspace_p", "proxy", "1", False, "share of relabelings, the true one counted, at least as far"),
            Quantity("subspace_distance_centred", "proxy", "1", None, "distance after taking the pooled mean away"),
            Quantity("subspace_z_centred", "proxy", "1", True, "z of the same; blind to a mere shift of the mean"),
            Quantity("subspace_p_centred", "proxy", "1", False, "p of the same"),
            Quantity(
                "subspace_effect",
                "proxy",
                "1",
                True,
                "||mean with - mean without|| / sqrt(summed variance within groups); not zero by chance: "
                "about sqrt(4 / n) without any effect",
            ),
            Quantity(
                "subspace_probe_auc",
                "lower_bound",
                "1",
                True,
                "AUC on the victims of a ridge regression fitted to auxiliary updates; 0.5 is chance",
            ),
        ),
        cost="train + T gradients in all; then about 2 s per layer for train=512",
        source="concept: Mo et al. 2021, arXiv 2105.13929; permutation null, effect size and probe are ours",
        params={"k": 10, "permutations": 200, "projection": 4096, "train": 512},
        fitted=True,
        needs=frozenset({"attribute", "shared_model"}),
    ),
):
    MEASURES.register(_spec.name, _spec)
