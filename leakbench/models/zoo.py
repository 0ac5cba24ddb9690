"""Classifiers of torchvision and timm by name, optionally with their pretrained weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from leakbench.errors import unknown


def torchvision_classifier(
    input_shape: tuple[int, ...],  # noqa: ARG001 - every torchvision classifier takes three channels of any size
    num_classes: int,
    *,
    name: str,
    pretrained: bool = False,
    **params: Any,
) -> nn.Module:
    """Return torchvision's classifier ``name``.

    Raises:
        UserError: torchvision has no such classifier.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown("torchvision architecture", name, known)
    weights = "DEFAULT" if pretrained else None
    return models.get_model(name, weights=weights, num_classes=num_classes, **params)  # type: ignore[no-any-return]


def timm_classifier(
    input_shape: tuple[int, ...], num_classes: int, *, name: str, pretrained: bool = False, **params: Any
) -> nn.Module:
    """Return timm's classifier ``name``.

    Raises:
        UserError: timm has no such classifier.
        ValueError: The pretrained weights are for another number of classes.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("timm architecture", name, timm.list_models())
    trained = timm.get_pretrained_cfg(name) if pretrained else None
    if trained is not None and trained.num_classes != num_classes:
        # timm would replace the last layer by an untrained one without a word.
        raise ValueError(f"the weights are for {trained.num_classes} classes, the dataset has {num_classes}")
    module: nn.Module = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, in_chans=input_shape[0], **params
    )
    return module
