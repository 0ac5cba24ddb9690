"""Deep image prior: images drawn by untrained convolutional networks whose weights are searched."""

from __future__ import annotations

from dataclasses import replace

from leakbench import Knowledge, NotApplicable, UserError, register
from leakbench.inversion import Adam, ConvolutionalPrior, Cosine, Inversion, InversionAttack, TotalVariation


@register("deep_image_prior", version=1)
class DeepImagePrior(InversionAttack):
    """Deep image prior: the cosine distance of gradients, minimised over the weights of networks that draw the inputs.

    Each input has a decoder of its own that turns fixed noise into an image. Such a network finds natural images sooner
    than noise whatever its weights start from, which regularises without any data. What it draws always lies within the
    valid pixel values.

    Sees: gradients of all layers, weights, number of inputs; labels where granted. Nothing depends on the scale of the
    update, so the learning rate of local steps may be unknown.

    A re-implementation: that networks with fixed noise are optimised, the objective and Adam's constants are CI-Net's
    released ones; the network is a plain decoder chosen here, see `leakbench.inversion.networks`.

    Args:
        steps: Iterations.
        lr: Learning rate of Adam on the weights; falls to 0 along a cosine.
        tv: Weight of the total variation.
        width: Channels of the networks.
        restarts: Random starts.
        labels: Label attack that runs first where labels are not granted.

    Reference: Ulyanov, Vedaldi, Lempitsky, "Deep Image Prior", CVPR 2018, arXiv 1711.10925, for the prior; Zhang et
    al., "Generative Gradient Inversion via Over-Parameterized Networks in Federated Learning", ICCV 2023 (CI-Net)
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        lr: float = 1e-3,
        tv: float = 0.0,
        width: int = 64,
        restarts: int = 1,
        labels: str = "llg",
    ) -> None:
        if width < 1:
            raise UserError(f"deep_image_prior: width: expected at least 1, got {width}; write width=64")
        self.steps, self.restarts, self.labels = steps, restarts, labels
        self.lr, self.tv, self.width = lr, tv, width
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv),),
            optimiser=Adam(lr=lr, betas=(0.5, 0.999), schedule="cosine"),
            steps=steps,
            restarts=restarts,
            labels=labels,
        )

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion for a task, in the space of networks that draw; decline what is no image."""
        shape = knowledge.input_spec.shape
        if len(shape) != 3:
            raise NotApplicable("the networks draw images")
        low, high = knowledge.bounds
        return replace(self.inversion, space=ConvolutionalPrior(shape=shape, low=low, high=high, width=self.width))
