from __future__ import annotations

import plain_client as plain
import pytest
import torch
from plain_client import B, C, T, close

from leakbench import Defense
from leakbench.chain import DefenseChain
from leakbench.errors import LeakbenchError
from leakbench.federation.aggregation import StreamedSum
from leakbench.federation.client import Client, ClientState, batch_order
from leakbench.tasks import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")


def send(model, inputs, labels, protocol, *parts, **options):
    options = {"random": plain.random(len(inputs))} | options
    return Client(protocol, B, DefenseChain(parts)).update(model, inputs, labels, **options)


def setting(protocol=None, net="mlp", draws=1, trials=T):
    protocol = protocol or Protocol()
    model = plain.make(net, draws)
    return model, *plain.examples(model, B * protocol.local_batches, trials), protocol


# --- what is sent -----------------------------------------------------------------------------------------------------

PROTOCOLS = {
    "gradient": {},
    "gradient of a sum": {"reduction": "sum"},
    "delta": {"sends": "delta", "local_steps": 3, "lr": 0.3},
    "delta of one step": {"sends": "delta", "lr": 0.3},
    "weights": {"sends": "weights", "local_steps": 3, "lr": 0.3},
    "momentum": {"sends": "delta", "local_steps": 3, "lr": 0.2, "momentum": 0.9},
    "weight decay": {"sends": "delta", "local_steps": 3, "lr": 0.2, "weight_decay": 0.1},
    "everything": {"sends": "weights", "local_steps": 3, "lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    | {"reduction": "sum"},
    "same batch": {"sends": "delta", "local_steps": 3, "lr": 0.3, "batches": "same"},
    "epochs": {"sends": "delta", "local_steps": 4, "lr": 0.3, "batches": "epochs", "batches_per_epoch": 2},
}


@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_update_is_that_of_a_plain_training_loop(name, draws):
    model, inputs, labels, protocol = setting(Protocol(**PROTOCOLS[name]), draws=draws)
    close(send(model, inputs, labels, protocol), plain.update(model, inputs, labels, protocol))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_batch_norm_and_its_buffers_are_those_of_a_plain_training_loop(sends, draws, mode):
    steps = {} if sends == "gradient" else {"local_steps": 2}
    protocol = Protocol(sends=sends, batch_norm=mode, send_buffers=True, **steps)
    model, inputs, labels, protocol = setting(protocol, "convnet", draws)
    before = {name: value.clone() for name, value in model.tensors().items()}
    close(send(model, inputs, labels, protocol), plain.update(model, inputs, labels, protocol))
    assert all(torch.equal(value, before[name]) for name, value in model.tensors().items())


def test_a_given_order_decides_which_examples_make_a_batch():
    protocol = Protocol(sends="delta", local_steps=4, lr=0.3, batches="epochs", batches_per_epoch=2)
    model, inputs, labels, protocol = setting(protocol)
    stream = torch.Generator().manual_seed(3)
    passes = [[torch.randperm(2 * B, generator=stream).view(2, B) for _ in range(2)] for _ in range(T)]
    order = torch.stack([torch.cat(own) for own in passes])
    shuffled = send(model, inputs, labels, protocol, order=order)
    close(shuffled, plain.update(model, inputs, labels, protocol, order=order))
    own = batch_order(protocol, B)
    assert own.tolist() == plain.batches_of(protocol, B)
    close(send(model, inputs, labels, protocol, order=own.expand(T, -1, -1)), send(model, inputs, labels, protocol))


def test_a_trial_does_not_depend_on_the_others():
    model, inputs, labels, protocol = setting(Protocol(sends="delta", local_steps=2, momentum=0.9), draws=T)
    whole = send(model, inputs, labels, protocol, Noise())
    for t in range(T):
        alone = send(
            model.trials(t, t + 1), inputs[t : t + 1], labels[t : t + 1], protocol, Noise(), random=plain.random(1, t)
        )
        close(alone, {name: value[t : t + 1] for name, value in whole.items()})


# --- which tensors are sent -------------------------------------------------------------------------------------------


class Noise(Defense):
    """Adds noise to every tensor by itself."""

    tensorwise = True

    def update(self, update, ctx):
        return {name: value + ctx.random.at(name).randn(*value.shape[1:]) for name, value in update.items()}


class Norm(Defense):
    """Looks across tensors: scales the update to norm 1."""

    def update(self, update, ctx):
        norm = torch.cat([value.flatten(1) for value in update.values()], 1).norm(dim=1)
        return {name: value / norm.view(-1, *(1,) * (value.dim() - 1)) for name, value in update.items()}


@pytest.mark.parametrize("part", [None, Noise, Norm])
@pytest.mark.parametrize("sends", ["gradient", "delta"])
@pytest.mark.parametrize(
    "names", [["fc.bias"], ["body.conv0.weight", "body.bn1.running_var"], ["body.bn1.running_mean"], []]
)
def test_only_what_is_asked_for_is_sent_and_it_is_what_would_be_sent_among_all(sends, names, part):
    protocol = Protocol(sends=sends, batch_norm="train", send_buffers=True)
    model, inputs, labels, protocol = setting(protocol, "convnet")
    parts = [] if part is None else [part()]
    whole = send(model, inputs, labels, protocol, *parts)
    asked = send(model, inputs, labels, protocol, *parts, names=frozenset(names))
    assert set(asked) == set(names)
    for name in names:
        torch.testing.assert_close(asked[name], whole[name], rtol=1e-9, atol=1e-11)


def test_buffers_stay_at_home_unless_the_protocol_sends_them():
    model, inputs, labels, protocol = setting(Protocol(batch_norm="train"), "convnet")
    assert set(send(model, inputs, labels, protocol)) == set(model.parameters)


# --- hooks ------------------------------------------------------------------------------------------------------------


class Recorder(Defense):
    """Notes what every hook sees."""

    def __init__(self):
        self.seen = []

    def note(self, hook, ctx):
        self.seen.append((hook, ctx.round, ctx.client, ctx.local_step, ctx))

    def batch(self, inputs, labels, ctx):
        self.note("batch", ctx)
        return inputs * 2, labels

    def step(self, grads, ctx):
        self.note("step", ctx)
        return grads

    def update(self, update, ctx):
        self.note("update", ctx)
        return update


def test_hooks_see_round_client_step_batch_loss_and_model():
    protocol = Protocol(sends="delta", local_steps=2, lr=0.3)
    model, inputs, labels, protocol = setting(protocol)
    recorder = Recorder()
    sent = send(model, inputs, labels, protocol, recorder, round_index=4, client=2)
    hooks = [seen[:4] for seen in recorder.seen]
    assert hooks == [(h, 4, 2, s) for s in range(2) for h in ("batch", "step")] + [("update", 4, 2, 1)]
    assert all(ctx.lr == 0.3 for *_, ctx in recorder.seen)
    contexts = {(hook, step): ctx for hook, _, _, step, ctx in recorder.seen}
    for step in range(2):
        own = slice(step * B, (step + 1) * B)
        torch.testing.assert_close(contexts["batch", step].inputs, inputs[:, own])
        torch.testing.assert_close(contexts["step", step].inputs, 2 * inputs[:, own])
        torch.testing.assert_close(contexts["step", step].labels, labels[:, own])
    losses = [
        torch.nn.functional.cross_entropy(plain.module(model, t)(2 * inputs[t, :B]), labels[t, :B]) for t in range(T)
    ]
    torch.testing.assert_close(contexts["step", 0].loss, torch.stack(losses).detach())
    close(contexts["step", 0].model.parameters, model.parameters)
    close(contexts["update", 1].model.parameters, {n: model.parameters[n] - v for n, v in sent.items()})


class Clip(Defense):
    """Clips every example's gradient to norm 0.1, or scales it where asked."""

    def per_example(self, grads, ctx):
        norms = torch.cat([value.flatten(2) for value in grads.values()], 2).norm(dim=2)
        factor = (0.1 / norms).clamp(max=1)
        return {name: value * factor.view(*factor.shape, *(1,) * (value.dim() - 2)) for name, value in grads.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("draws", [1, T])
def test_per_example_hooks_see_every_example_before_the_reduction(reduction, draws):
    model, inputs, labels, protocol = setting(Protocol(reduction=reduction), draws=draws)
    rows = []
    for t in range(T):
        total = {}
        for i in range(B):
            one, _ = plain.train(model, t, inputs[t], labels[t], Protocol(), [[i]])
            norm = torch.cat([value.flatten() for value in one.values()]).norm()
            for name, value in one.items():
                total[name] = total.get(name, 0) + value * min(1.0, 0.1 / float(norm))
        rows.append({name: value / (B if reduction == "mean" else 1) for name, value in total.items()})
    expected = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    close(send(model, inputs, labels, protocol, Clip()), expected)


class Halve(Defense):
    """Halves in ``step``, or in ``per_example``."""

    def step(self, grads, ctx):
        return {name: value / 2 for name, value in grads.items()}


class HalveEach(Defense):
    """Halves in ``per_example``."""

    def per_example(self, grads, ctx):
        return {name: value / 2 for name, value in grads.items()}


def test_a_linear_hook_gives_the_same_per_example_and_per_step():
    model, inputs, labels, protocol = setting(Protocol(sends="weights", local_steps=3, momentum=0.9))
    halved = send(model, inputs, labels, protocol, Halve())
    close(halved, send(model, inputs, labels, protocol, HalveEach()))
    close(halved, plain.update(model, inputs, labels, protocol.model_copy(update={"lr": protocol.lr / 2})))


def test_per_example_hooks_refuse_batch_norm_in_train_mode():
    model, inputs, labels, protocol = setting(Protocol(batch_norm="train"), "convnet")
    with pytest.raises(LeakbenchError, match="batch_norm: eval"):
        send(model, inputs, labels, protocol, Clip())


class Smooth(Defense):
    """Label smoothing."""

    def batch(self, inputs, labels, ctx):
        hard = torch.nn.functional.one_hot(labels, C).to(inputs.dtype)
        return inputs, 0.9 * hard + 0.1 / C


@pytest.mark.parametrize("sends", ["gradient", "delta"])
def test_a_batch_hook_may_make_labels_soft(sends):
    model, inputs, labels, protocol = setting(Protocol(sends=sends))
    expected = plain.update(model, inputs, labels, protocol, label_smoothing=0.1)
    close(send(model, inputs, labels, protocol, Smooth()), expected)
    soft = torch.nn.functional.one_hot(labels, C).double() * 0.9 + 0.1 / C
    close(send(model, inputs, soft, protocol), expected)


class Double(Defense):
    """Every example twice."""

    def batch(self, inputs, labels, ctx):
        return torch.cat([inputs, inputs], 1), torch.cat([labels, labels], 1)


class First(Defense):
    """The first two examples only."""

    def batch(self, inputs, labels, ctx):
        return inputs[:, :2], labels[:, :2]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_hook_may_change_the_batch_size(reduction):
    model, inputs, labels, protocol = setting(Protocol(reduction=reduction))
    whole = send(model, inputs, labels, protocol)
    twice = {name: value * (1 if reduction == "mean" else 2) for name, value in whole.items()}
    close(send(model, inputs, labels, protocol, Double()), twice)
    few = plain.update(model, inputs[:, :2], labels[:, :2], protocol, 2)
    close(send(model, inputs, labels, protocol, First()), few)


class ErrorFeedback(Defense):
    """Sends the even coordinates and adds the rest to the next update."""

    def update(self, update, ctx):
        sent = {}
        for name, value in update.items():
            total = value + ctx.state.get(name, torch.zeros_like(value))
            even = (torch.arange(value[0].numel()) % 2 == 0).view(value.shape[1:])
            sent[name] = total * even
            ctx.state[name] = total - sent[name]
        return sent


def test_error_feedback_keeps_its_state_across_the_rounds_of_one_client():
    model, inputs, labels, protocol = setting()
    states = [ClientState(), ClientState()]
    sent = [[], []]
    for round_index in range(3):
        for client in range(2):
            data = inputs + round_index + 10 * client, labels
            options = {"state": states[client], "round_index": round_index, "client": client}
            sent[client].append(send(model, *data, protocol, ErrorFeedback(), **options))
    for client in range(2):
        clean = [plain.update(model, inputs + r + 10 * client, labels, protocol) for r in range(3)]
        (kept,) = states[client].defense.values()
        close(
            {name: sum(update[name] for update in sent[client]) + kept[name] for name in kept},
            {name: sum(update[name] for update in clean) for name in kept},
        )
        assert any(value.abs().max() > 0 for value in kept.values())


def test_without_a_state_every_update_starts_afresh():
    model, inputs, labels, protocol = setting()
    first = send(model, inputs, labels, protocol, ErrorFeedback())
    close(send(model, inputs, labels, protocol, ErrorFeedback()), first)


# --- differentiable ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [None, Halve, HalveEach, Smooth])
@pytest.mark.parametrize(
    ("sends", "steps", "draws"), [("gradient", 1, 1), ("gradient", 1, 2), ("delta", 1, 1), ("delta", 2, 1)]
)
def test_a_differentiable_update_has_the_derivative_of_finite_differences(sends, steps, draws, part):
    protocol = Protocol(sends=sends, local_steps=steps, lr=0.5, momentum=0.5)
    model, inputs, labels, protocol = setting(protocol, draws=draws, trials=2)
    parts = [] if part is None else [part()]

    def sent(values):
        update = send(model, values, labels, protocol, *parts, create_graph=True)
        return torch.cat([value.flatten(1) for value in update.values()], 1)[:, ::7]

    assert torch.autograd.gradcheck(sent, inputs.requires_grad_(), atol=1e-7, rtol=1e-5)


def test_an_update_is_not_differentiable_unless_asked_for():
    model, inputs, labels, protocol = setting()
    update = send(model, inputs.requires_grad_(), labels, protocol)
    assert not any(value.requires_grad for value in update.values())


# --- aggregation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_a_streamed_sum_is_the_mean_of_what_was_added_and_keeps_its_inputs(clients):
    stream = torch.Generator().manual_seed(1)
    updates = [{"a": torch.randn(T, 2, generator=stream), "n": torch.tensor([k, 1, 2])} for k in range(clients)]
    copies = [{name: value.clone() for name, value in update.items()} for update in updates]
    total = StreamedSum((1,) * clients)
    for update in updates:
        total.add(update)
    mean = total.mean()
    for name in ("a", "n"):
        expected = torch.stack([update[name].double() for update in copies]).mean(0)
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(u[name], c[name]) for u, c in zip(updates, copies, strict=True))
