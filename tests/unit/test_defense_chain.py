from __future__ import annotations

import plain_client as plain
import pytest
import torch
from plain_client import B, C, T

from leakbench import Defense, register
from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.errors import InvalidOutput


def context(random=None, **changes):
    model = plain.make()
    inputs, labels = plain.examples(model, B)
    fields = {"model": model, "inputs": inputs, "labels": labels, "loss": None, "round": 0, "client": 0}
    fields |= {"local_step": 0, "lr": 0.1, "random": random or plain.random()}
    return DefenseContext(**(fields | changes))


def gradient():
    return {"w": torch.arange(T * 6.0).view(T, 2, 3), "b": torch.ones(T, 2)}


@register("add")
class Add(Defense):
    """Adds a number."""

    def __init__(self, *, value: float = 1.0) -> None:
        self.value = value

    def batch(self, inputs, labels, ctx):
        return inputs + self.value, labels

    def step(self, grads, ctx):
        return {name: value + self.value for name, value in grads.items()}


@register("double")
class Double(Defense):
    """Doubles."""

    def batch(self, inputs, labels, ctx):
        return inputs * 2, labels

    def step(self, grads, ctx):
        return {name: value * 2 for name, value in grads.items()}


@register("draw")
class Draw(Defense):
    """Replaces every tensor by its draws, scaled."""

    def __init__(self, *, std: float = 1.0) -> None:
        self.std = std

    def step(self, grads, ctx):
        self.seen = {n: self.std * ctx.random.at(n).randn(*v.shape[1:]).to(v.dtype) for n, v in grads.items()}
        return self.seen

    update = step


@register("other")
class Other(Draw):
    """The same under another name."""


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "result"), [((Add(), Double()), 4.0), ((Double(), Add()), 3.0), ((), 1.0)])
def test_the_first_part_acts_first(parts, result):
    chain, ctx = DefenseChain(parts), context()
    assert torch.equal(chain.tensors("step", {"b": torch.ones(T, 2)}, ctx)["b"], torch.full((T, 2), result))
    ones = torch.ones(T, B, 1, 3, 3, dtype=torch.float64)
    assert torch.equal(chain.batch(ones, ctx.labels, ctx)[0], result * ones)


def test_architectures_are_changed_in_order_too():
    class Wrap(Defense):
        def __init__(self, *, name):
            self.label = name

        def model(self, model):
            return torch.nn.ModuleDict({self.label: model})

    net = DefenseChain([Wrap(name="first"), Wrap(name="second")]).model(torch.nn.Linear(1, 1))
    assert isinstance(net["second"]["first"], torch.nn.Linear)


def test_an_empty_chain_changes_nothing():
    chain, ctx, grads = DefenseChain(), context(), gradient()
    assert chain.tensors("step", grads, ctx) is grads
    assert chain.batch(ctx.inputs, ctx.labels, ctx)[0] is ctx.inputs
    assert not chain.needs_all_tensors
    assert not any(chain.acts_in(hook) for hook in ("model", "batch", "per_example", "step", "update"))


def test_a_chain_needs_all_tensors_when_an_acting_part_looks_across_them():
    class Alone(Draw):
        tensorwise = True

    class BatchOnly(Defense):
        def batch(self, inputs, labels, ctx):
            return inputs, labels

    assert not DefenseChain([Alone(), BatchOnly()]).needs_all_tensors
    assert DefenseChain([Alone(), Draw()]).needs_all_tensors


# --- streams and state ------------------------------------------------------------------------------------------------


def draws(chain, part=-1, hook="update", ctx=None):
    """Return what the given part of the chain draws."""
    chain.tensors(hook, gradient(), ctx or context())
    return chain.parts[part].seen


def equal(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_defense_draws_the_same_noise_alone_and_in_a_chain_and_at_every_strength():
    alone = draws(DefenseChain([Draw()]))
    assert equal(alone, draws(DefenseChain([Double(), Draw(), Add()]), 1))
    assert equal(alone, draws(DefenseChain([Other(), Draw()])))
    strong = draws(DefenseChain([Draw(std=4.0)]))
    assert equal({name: 4 * value for name, value in alone.items()}, strong)


def test_parts_hooks_and_moments_never_share_a_draw():
    twice = DefenseChain([Draw(), Draw()])
    chain = DefenseChain([Draw()])
    every = [
        draws(chain),
        draws(chain, hook="step"),
        draws(twice, 1),
        draws(DefenseChain([Other()])),
        *(draws(chain, ctx=context(plain.random().at(*moment))) for moment in ((0, 0, 1), (0, 1, 0), (1, 0, 0))),
    ]
    for name in ("w", "b"):
        assert len({tuple(result[name].flatten().tolist()) for result in every}) == len(every)


def test_state_belongs_to_a_part_and_is_shared_by_its_hooks():
    class Count(Defense):
        def step(self, grads, ctx):
            ctx.state["n"] = ctx.state.get("n", torch.zeros(T)) + 1
            return grads

        update = step

    ctx = context()
    chain = DefenseChain([Count(), Add(), Count()])
    for hook in ("step", "step", "update"):
        chain.tensors(hook, gradient(), ctx)
    assert [state["n"].tolist() for state in ctx.states.values() if state] == [[3.0] * T] * 2
    assert ctx.state == {}


# --- what a part returns ----------------------------------------------------------------------------------------------


def returning(hook, result):
    cls = type("Wrong", (Defense,), {hook: lambda self, *given: result(*given[:-1])})
    return DefenseChain([cls()])


def in_place(grads):
    grads["w"].mul_(2)
    return grads


@pytest.mark.parametrize("hook", ["per_example", "step", "update"])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda g: None, ["must return a dict of tensors", "NoneType"]),
        (lambda g: list(g.values()), ["must return a dict of tensors", "list"]),
        (lambda g: {"w": g["w"]}, ["'b'", "torch.float32 (3, 2)", "got nothing"]),
        (lambda g: {**g, "x": g["b"]}, ["'x'", "expected nothing"]),
        (lambda g: {**g, 3: g["b"]}, ["3", "expected nothing"]),
        (lambda g: {**g, "b": g["b"][:, :1]}, ["'b'", "(3, 2)", "(3, 1)"]),
        (lambda g: {**g, "b": g["b"].mean(0, keepdim=True)}, ["'b'", "(3, 2)", "(1, 2)"]),
        (lambda g: {**g, "b": g["b"].double()}, ["'b'", "torch.float32", "torch.float64"]),
        (lambda g: {**g, "b": g["b"].to("meta")}, ["'b'", "cpu", "meta"]),
        (lambda g: {**g, "b": g["b"].numpy()}, ["'b'", "ndarray"]),
        (in_place, ["changed 'w' in place", "return new tensors"]),
    ],
)
def test_wrong_tensors_are_one_line_with_the_part_the_hook_and_the_name(hook, result, words):
    with pytest.raises(InvalidOutput) as error:
        returning(hook, result).tensors(hook, gradient(), context())
    text = str(error.value)
    assert text.startswith(f"Wrong().{hook} ")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_model_changed_in_place_is_noticed():
    ctx = context()
    chain = returning("step", lambda grads: (ctx.model.parameters["fc.bias"].zero_(), grads)[1])
    with pytest.raises(InvalidOutput, match=r"changed 'fc\.bias' in place"):
        chain.tensors("step", gradient(), ctx)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x, y: x, ["two tensors (inputs, labels)", "torch.float64"]),
        (lambda x, y: (x, y, y), ["two tensors", "tuple"]),
        (lambda x, y: (x, None), ["two tensors", "tuple"]),
        (lambda x, y: (x[:1], y[:1]), ["(3, B, 1, 3, 3)", "(1, 4, 1, 3, 3)"]),
        (lambda x, y: (x.flatten(2), y), ["(3, B, 1, 3, 3)", "(3, 4, 9)"]),
        (lambda x, y: (x, y[:, :1]), ["(3, 1)"]),
        (lambda x, y: (x[:, :0], y[:, :0]), ["(3, 0, 1, 3, 3)"]),
        (lambda x, y: (x, y.double()), ["torch.int64 labels (3, B)", "got", "torch.float64 (3, 4)"]),
        (lambda x, y: (x.float(), y), ["torch.float64 inputs", "got torch.float32"]),
        (lambda x, y: (x, torch.ones(T, B, C + 1).double()), [f"(3, B, {C})", f"(3, 4, {C + 1})"]),
        (lambda x, y: (x, torch.ones(T, B, C).long()), ["torch.float64 ones", "torch.int64 (3, 4, 5)"]),
    ],
)
def test_a_wrong_batch_is_one_line_with_what_was_expected(result, words):
    ctx = context()
    with pytest.raises(InvalidOutput) as error:
        returning("batch", result).batch(ctx.inputs, ctx.labels, ctx)
    text = str(error.value)
    assert text.startswith("Wrong().batch")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_defense_that_declares_no_likelihood_says_so():
    with pytest.raises(NotImplementedError, match="Add declares no likelihood"):
        Add().log_likelihood({}, {}, context())
