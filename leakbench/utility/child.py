"""The child's half of a federated training: the clients of all rounds, with the defense at work in every one of them.

The clients are the trials of a block: what they do is what `leakbench.runner.child.ClientRole` does under attack.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from leakbench.accounting import chain_mu
from leakbench.federation.inputs import to_inputs
from leakbench.models.functional import Model, split_state
from leakbench.runner.child import ClientRole, Reply
from leakbench.runner.loading import Local
from leakbench.runner.wire import Message
from leakbench.tasks import InputSpec


class TrainingRole(ClientRole):
    """K clients that take part in every round, or a judge that knows inputs but no labels.

    The request is that of `ClientRole` for one client and K trials, but for the victims: these are all examples that a
    request may point at, uint8 images (n, *shape) and labels (n,).
    """

    def __init__(self, message: Message, local: Local) -> None:
        super().__init__(message, local)
        self.examples, self.classes = self.images, self.labels
        self.out = torch.zeros(1, self.random.trials, dtype=torch.bool, device=self.device)

    def round(self, message: Message) -> Reply:
        """One round: every client's update of the model that was sent, K in place of T.

        The body holds ``round``; the blobs are ``model`` (M = 1) and ``batch``: ``indices`` (K, N) into the examples
        and, where the protocol's batches are shuffled, ``order`` (K, 1, local_steps, B). The answer's ``cpu_seconds``
        are those of this process.
        """
        self._load(message)
        batch = message.tensors("batch")
        self.images = self.examples[batch["indices"]][:, None]
        self.labels = self.classes[batch["indices"].to(self.device)][:, None]
        self.order = batch.get("order")
        # Not wall time: other workers share the cores.
        begun = time.process_time()
        kind, body, blobs = super().round(message)
        return kind, body | {"cpu_seconds": time.process_time() - begun}, blobs

    def promise(self, _: Message) -> Reply:
        """Return mu of one example of one round, as far as the defense declares it; see `chain_mu`."""
        (client,) = self.clients
        mu = chain_mu(client.defense, self.protocol, client.batch_size, layers=len(self.model.layers))
        return "promise", {"mu": mu}, {}

    def predict(self, message: Message) -> Reply:
        """Return the class that the model that was sent (blob ``model``) gives every example, int64 (n,)."""
        self._load(message)
        return (
            "predicted",
            {},
            {"predicted": {"classes": predict(self.model, self.examples, self.spec, self.normalise)}},
        )

    def _load(self, message: Message) -> None:
        parameters, buffers = split_state(message.tensors("model"))
        self.model = self.model.with_state(
            {name: value.to(self.device, self.model.dtype) for name, value in parameters.items()},
            {name: value.to(self.device) for name, value in buffers.items()},
        )


PREDICTED = 1024
"""Examples of one forward pass."""


@torch.no_grad()
def predict(model: Model, images: Tensor, spec: InputSpec, normalise: bool) -> Tensor:
    """Return the classes (n,) that a model (M = 1) gives uint8 images (n, *shape), with running statistics."""
    found = []
    for part in torch.split(images, PREDICTED):
        inputs = to_inputs(part.numpy(), spec, normalise).to(model.device, model.dtype)
        found.append(model.logits(inputs[None])[0].argmax(-1).cpu())
    return torch.cat(found)
