"""The laws of defenses, each tried on blocks of `leakbench.submitting.blocks`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from leakbench.chain import DefenseChain
from leakbench.defense import HOOKS, Defense
from leakbench.submitting.blocks import BLOCKS, Block
from leakbench.submitting.laws import FILE_LAWS, Broken, Law

TRIED = ("gradient", "delta", "clients")
"""The blocks that every defense is tried on."""
_ALONE = 2
_SHARES = (0.1, 0.4, 0.7, 1.0)


def _blocks(cls: type[Defense]) -> list[tuple[str, Block]]:
    return [(name, BLOCKS[name].under(cls())) for name in TRIED]


def declares_its_hooks(cls: type[Defense]) -> str:
    """`acts_on` names the hooks that it brings, and `strength` one of its parameters."""
    own = {hook for hook in HOOKS if getattr(cls, hook) is not getattr(Defense, hook)}
    if set(cls.acts_on) != own:
        raise Broken(f"acts_on is {sorted(cls.acts_on)}, the methods it brings are {sorted(own)}; make them equal")
    if cls.strength is not None:
        parameter, stronger = cls.strength
        if parameter not in cls().params() or stronger not in ("higher", "lower"):
            raise Broken(f"strength: expected (one of its parameters, 'higher' or 'lower'), got {cls.strength}")
    return "acts on " + ", ".join(sorted(own))


def keeps_names_shapes_and_dtypes(cls: type[Defense]) -> None:
    """What is sent has the tensors of the undefended update, all finite."""
    for name, block in _blocks(cls):
        clean, sent = block.update(), block.update(defense=cls())
        if set(sent) != set(clean):
            raise Broken(f"{name}: sends the tensors {sorted(sent)}, expected {sorted(clean)}; zeros say nothing")
        for tensor, value in clean.items():
            if (sent[tensor].shape, sent[tensor].dtype) != (value.shape, value.dtype):
                got = f"{tuple(sent[tensor].shape)} {sent[tensor].dtype}"
                raise Broken(f"{name}: {tensor} is {got}, expected {tuple(value.shape)} {value.dtype}; keep both")
            if not bool(sent[tensor].isfinite().all()):
                raise Broken(f"{name}: {tensor} holds NaN or infinity; guard divisions")


def same_streams_same_update(cls: type[Defense]) -> None:
    """A second run with the same random streams sends the same, bit by bit."""
    for name, block in _blocks(cls):
        once, again = block.update(defense=cls()), block.update(defense=cls())
        for tensor, value in once.items():
            if not torch.equal(value, again[tensor]):
                raise Broken(
                    f"{name}: {tensor} differs between two runs; draw from ctx.random, never from torch's own generator"
                )


def declares_what_it_draws(cls: type[Defense]) -> str | None:
    """`draws` is empty exactly where other random streams change nothing."""
    block = BLOCKS["gradient"].under(cls())
    once, other = block.update(defense=cls()), replace(block, streams=9).update(defense=cls())
    same = all(torch.equal(value, other[name]) for name, value in once.items())
    if same and cls.draws:
        raise Broken(f"draws says {cls.draws!r}, but other random streams change nothing; leave it empty")
    if not same and not cls.draws:
        raise Broken("it draws at random; say what in a line: draws = 'normal noise, one number per coordinate'")
    return f"draws {cls.draws}" if cls.draws else "draws nothing"


def trials_are_independent(cls: type[Defense]) -> None:
    """What a trial's client sends does not depend on the other trials of its block."""
    for name, block in _blocks(cls):
        whole, alone = block.update(defense=cls()), block.only(_ALONE).update(defense=cls())
        for tensor, value in whole.items():
            try:
                torch.testing.assert_close(value[_ALONE : _ALONE + 1], alone[tensor])
            except AssertionError:
                raise Broken(
                    f"{name}: {tensor} of a trial changes when it runs alone; every tensor starts with T, the trials: "
                    "never reduce dim=0"
                ) from None


def tensors_are_treated_alike_alone(cls: type[Defense]) -> str | None:
    """A tensorwise defense sends the same of a tensor with and without the others, and nothing unasked."""
    for name, each in _blocks(cls):
        if each.update(defense=cls(), names=[]) != {}:
            raise Broken(f"{name}: sends tensors that were not asked for; return the keys of what you were given")
    block = BLOCKS["gradient"].under(cls())
    if not cls().tensorwise:
        return "looks across tensors"
    for name, value in block.update(defense=cls()).items():
        try:
            torch.testing.assert_close(block.update(defense=cls(), names=[name])[name], value)
        except AssertionError:
            raise Broken(
                f"{name} changes when it is computed alone; set tensorwise = False, or draw from streams "
                "named by the tensor (ctx.random.at(name))"
            ) from None
    return None


def distortion(block: Block, defense: Defense) -> Tensor:
    """Return, per trial (T,), the L2 distance of the update to the undefended one."""
    block = block.under(defense)
    clean, sent = block.update(), block.update(defense=defense)
    return torch.stack([(sent[n] - clean[n]).flatten(1).square().sum(1) for n in clean]).sum(0).sqrt()


def changes_nothing_at_strength_zero(cls: type[Defense]) -> str | None:
    """With the parameters of `neutral` the update is the undefended one."""
    if cls.neutral is None:
        return "no strength zero declared; where there is one, write neutral = {'std': 0.0}"
    unknown = set(cls.neutral) - set(cls().params())
    if unknown:
        raise Broken(f"neutral: {min(unknown)!r} is none of its parameters {sorted(cls().params())}")
    for name in TRIED:
        far = distortion(BLOCKS[name], cls(**cls.neutral)).max().item()
        if far >= 1e-12:
            raise Broken(f"{name}: with neutral = {dict(cls.neutral)} the update still moves by {far:.2g} (L2 norm)")
    return None


def distortion_grows_with_strength(cls: type[Defense]) -> str | None:
    """The stronger, the further is what is sent from the undefended update, in every trial."""
    if cls.strength is None:
        return "no strength declared, so it is not swept"
    parameter, stronger = cls.strength
    default = cls().params()[parameter]
    sweep = [type(default)(default * share) for share in _SHARES]
    if stronger == "lower":
        sweep.reverse()
    far = torch.stack([distortion(BLOCKS["gradient"], cls(**{parameter: value})) for value in sweep])
    if bool((far.diff(dim=0) < 0).any()) or not bool((far[-1] > far[0]).all()):
        shown = ", ".join(f"{v:.3g}: {d:.3g}" for v, d in zip(sweep, far.mean(1).tolist(), strict=True))
        raise Broken(
            f"distortion does not grow with {parameter} ({stronger} is stronger): {shown}; use the same draws at every "
            "strength, or correct `strength`"
        )
    return None


def arguments_are_not_changed_in_place(cls: type[Defense]) -> None:
    """What hooks are handed is as before."""
    block = BLOCKS["gradient"].under(cls())
    model, chain, ctx = block.model, DefenseChain([cls()]), block.context(1)
    images, labels = (value[:, 0] for value in block.victims)
    gradient = block.update()
    per_example = {name: torch.stack([value] * 3, 1) for name, value in gradient.items()}
    handed = {"inputs": images, "labels": labels.double(), **model.parameters}
    handed |= {f"update {name}": value for name, value in gradient.items()}
    handed |= {f"per-example gradient {name}": value for name, value in per_example.items()}
    before = {name: value.clone() for name, value in handed.items()}
    chain.batch(images, labels, ctx)
    chain.tensors("per_example", per_example, ctx)
    chain.tensors("step", gradient, ctx)
    chain.tensors("update", gradient, ctx)
    for name, value in handed.items():
        if not torch.equal(value, before[name]):
            raise Broken(f"{name} was changed in place; return new tensors (no add_, mul_, [...] = )")


DEFENSE_LAWS = (
    *FILE_LAWS,
    Law("declares the hooks it brings", declares_its_hooks),
    Law("keeps names, shapes and dtypes; finite", keeps_names_shapes_and_dtypes, first=True),
    Law("same streams, same update", same_streams_same_update),
    Law("declares what it draws", declares_what_it_draws),
    Law("trials do not depend on each other", trials_are_independent),
    Law("tensors are treated alike alone", tensors_are_treated_alike_alone),
    Law("identity at strength zero", changes_nothing_at_strength_zero),
    Law("distortion grows with strength", distortion_grows_with_strength),
    Law("arguments are not changed in place", arguments_are_not_changed_in_place),
)
