"""What the harness tells an attack of its task, in the form in which it crosses to the attack's process."""

from __future__ import annotations

from dataclasses import dataclass

from leakbench.tasks import AttributeSpec, InputSpec, Protocol


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The public and the granted numbers of a task; a withheld one is None. JSON-able.

    Args:
        granted: Names the threat model grants.
        protocol: What the client does; hyper-parameters that are withheld hold their defaults and are not readable.
        input_spec: What one input is.
        normalised: Whether inputs are normalised by the spec's mean and std.
        num_classes: C.
        clients: K.
        batch_size: B; the mean, rounded up, where clients differ.
        inputs_per_client: N; the mean, rounded up, where clients differ.
        client_sizes: (K,) examples behind each client's update.
        local_batches: Distinct batches of a client; inputs over batch size where None.
        class_prior: (C,) class frequencies of the data source.
        wall_seconds: Time the whole block may take.
        model_evaluations: Gradient evaluations per trial that the budget allows; None is unlimited.
        target: What the task asks for: ``labels``, ``inputs``, ``attribute`` or ``membership``.
        attribute: Which attribute, where that is the target.
    """

    granted: frozenset[str]
    protocol: Protocol
    input_spec: InputSpec
    normalised: bool
    num_classes: int
    clients: int = 1
    batch_size: int | None = None
    inputs_per_client: int | None = None
    client_sizes: tuple[int, ...] | None = None
    local_batches: int | None = None
    class_prior: tuple[float, ...] | None = None
    wall_seconds: float | None = None
    model_evaluations: int | None = None
    target: str = "labels"
    attribute: AttributeSpec | None = None
