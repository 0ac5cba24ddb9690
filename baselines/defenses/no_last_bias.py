"""A last layer without a bias."""

from __future__ import annotations

from torch import nn

from leakbench import Defense, UserError, register


@register("no_last_bias", version=1)
class NoLastBias(Defense):
    """No last bias: removes the bias of the last linear layer before the net is trained.

    The bias's gradient, p_c - y_c of every class c, gives labels away. The rows of the weight's gradient do too where
    the layer's inputs h are not negative: at one example row c sums up to (p_c - y_c) sum_j h_j, negative for the true
    class alone. So only attacks that need the bias itself are stopped. All other initial weights stay as they are.

    Acts on: the model.

    Reference: none; folklore among the defenses against label attacks, which the row sums above contradict
    """

    acts_on = frozenset({"model"})
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels", "llg")

    def model(self, model: nn.Module) -> nn.Module:
        """Remove the bias.

        Raises:
            UserError: The model has no linear layer.
        """
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise UserError("no_last_bias: expected a net that ends in a linear layer; choose another architecture")
        layers[-1].register_parameter("bias", None)
        return model
