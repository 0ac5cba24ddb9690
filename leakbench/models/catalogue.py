"""The architectures by name. No torch here: planning and listing read this."""

from __future__ import annotations

from dataclasses import dataclass

from leakbench.errors import unknown
from leakbench.registry import Registry
from leakbench.tasks import Architecture

ZOOS = ("torchvision", "timm")
"""Libraries whose classifiers are available as ``LIBRARY/NAME``."""


@dataclass(frozen=True)
class ArchitectureSpec:
    """What is known about an architecture without building it.

    Args:
        name: Name in tasks.
        build: ``module:function``; the function takes (input_shape, num_classes, keyword parameters) and returns an
            ``nn.Module`` that ends in a linear layer.
        description: One line.
        reference: Authors, year, arXiv id or venue.
        nonnegative_features: Whether the input of the last layer is never negative with default parameters (the
            condition of LLG-like attacks); None when unknown.
        batch_norm: Whether there are BatchNorm layers; None when unknown.
    """

    name: str
    build: str
    description: str
    reference: str
    nonnegative_features: bool | None
    batch_norm: bool | None


ARCHITECTURES: Registry[ArchitectureSpec] = Registry("architecture")


def architecture_spec(name: str) -> ArchitectureSpec:
    """Return the spec of ``name``, which may be ``torchvision/NAME`` or ``timm/NAME``.

    Whether the library knows NAME turns out when the model is built.

    Raises:
        UserError: There is no such architecture.
    """
    library, _, rest = name.partition("/")
    if rest and library in ZOOS:
        return ArchitectureSpec(
            name=name,
            build=f"leakbench.models.zoo:{library}_classifier",
            description=f"classifier {rest!r} of {library}",
            reference=f"{library} documentation",
            nonnegative_features=None,
            batch_norm=None,
        )
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, [*ARCHITECTURES, "torchvision/NAME", "timm/NAME"])
    return ARCHITECTURES.get(name)


_NONNEGATIVE = frozenset({"relu", "sigmoid", "softplus"})


def nonnegative_features(architecture: Architecture) -> bool | None:
    """Return whether the input of the last layer is never negative; None when unknown.

    Raises:
        UserError: There is no such architecture.
    """
    activation = architecture.params.get("activation")
    if architecture.params.get("depth") == 0 or (activation is not None and activation not in _NONNEGATIVE):
        return False
    return True if activation else architecture_spec(architecture.name).nonnegative_features


for _spec in (
    ArchitectureSpec(
        "mlp",
        "leakbench.models.small:mlp",
        "fully connected net; params: width (300), depth (2 hidden layers), activation (relu), batch_norm (false)",
        "FCN-3 of Ma et al., iLRG, ICLR 2023",
        nonnegative_features=True,
        batch_norm=False,
    ),
    ArchitectureSpec(
        "lenet_zhu",
        "leakbench.models.small:lenet_zhu",
        "LeNet of DLG, CNN of LLG: three 5x5 convolutions; params: activation (sigmoid); their init: uniform(0.5)",
        "Zhu et al. 2019, DLG, arXiv:1906.08935; Wainakh et al. 2022, LLG, arXiv:2105.09369",
        nonnegative_features=True,
        batch_norm=False,
    ),
    ArchitectureSpec(
        "lenet5",
        "leakbench.models.small:lenet5",
        "LeNet-5 with max pooling; params: activation (relu), batch_norm (false); inputs of at least 12x12",
        "LeCun et al. 1998, Proc. IEEE 86(11)",
        nonnegative_features=True,
        batch_norm=False,
    ),
    ArchitectureSpec(
        "vgg",
        "leakbench.models.small:vgg",
        "VGG with BatchNorm for small images; params: depth (16); inputs of at least 32x32",
        "Simonyan & Zisserman 2014, arXiv:1409.1556",
        nonnegative_features=True,
        batch_norm=True,
    ),
    ArchitectureSpec(
        "vgg9",
        "leakbench.models.small:vgg9",
        "VGG-9 of FedMA, without normalisation; params: width (32); inputs of at least 8x8",
        "Wang et al. 2020, FedMA, arXiv:2002.06440",
        nonnegative_features=True,
        batch_norm=False,
    ),
    ArchitectureSpec(
        "alexnet_small",
        "leakbench.models.small:alexnet_small",
        "AlexNet's layers for small images; params: width (32); inputs of at least 8x8",
        "Krizhevsky, Sutskever, Hinton 2012, NeurIPS",
        nonnegative_features=True,
        batch_norm=False,
    ),
    ArchitectureSpec(
        "convnet",
        "leakbench.models.small:convnet",
        "the ConvNet of Inverting Gradients; params: width (64); inputs of at least 9x9",
        "Geiping et al. 2020, arXiv:2003.14053",
        nonnegative_features=True,
        batch_norm=True,
    ),
    ArchitectureSpec(
        "resnet18",
        "leakbench.models.resnet:resnet18",
        "ResNet-18 for small images (3x3 stem, no first pooling); params: width (64)",
        "He et al. 2015, arXiv:1512.03385",
        nonnegative_features=True,
        batch_norm=True,
    ),
    ArchitectureSpec(
        "resnet20",
        "leakbench.models.resnet:resnet20",
        "ResNet-20 for small images with projection shortcuts; params: width (16)",
        "He et al. 2015, arXiv:1512.03385",
        nonnegative_features=True,
        batch_norm=True,
    ),
):
    ARCHITECTURES.register(_spec.name, _spec)
