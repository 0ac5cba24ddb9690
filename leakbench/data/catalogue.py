"""Which datasets there are, where they come from and what their examples look like. Data only, nothing is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from leakbench.parts import Part
from leakbench.registry import Registry
from leakbench.tasks import InputSpec

SOURCE_CLASS = "class"
"""Attribute that every dataset has: its source's own label."""


class DatasetSpec(Part):
    """A named source of labelled images."""

    name: str
    """Name in suites and rows, or the ``.npz`` path as typed."""
    hub_id: str | None = None
    """Dataset repository on the Hugging Face hub; None for embedded digits and ``.npz`` files."""
    folder: str = ""
    """Folder of the repository (usually the hub's config name) that holds ``<split>-*.parquet``."""
    train_split: str = "train"
    """Source split that is cut into private and auxiliary; without a ``test_split`` also into test."""
    test_split: str | None = None
    """Source split that becomes test; None where there is only one split."""
    image_column: str = "image"
    """Column of encoded images."""
    label_columns: tuple[str, ...] = ("label",)
    """One column of class indices, or several boolean ones: the class is then the index of the only true column, and
    a last class "other" holds examples with none or several."""
    attribute_columns: tuple[str, ...] = ()
    """Further integer or boolean columns that an attribute target may ask for."""
    label_maps: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Attributes that follow from the label: name -> value per class."""
    main_task: str = ""
    """Label map whose values are the labels that clients train on; the source's own labels, which the maps are of,
    stay readable as attribute ``class``."""
    classes: Annotated[int, Field(ge=1)]
    """Number of classes (C)."""
    input: InputSpec
    """Shape of one image (channels, height, width) and its normalisation."""
    fit: bool = False
    """Whether images of any size are center-cropped to the aspect of ``input.shape`` and resized (bilinear) to it;
    otherwise another size is an error."""
    max_examples: Annotated[int, Field(ge=5)] | None = None
    """Cap on what is decoded of ``train_split``: a fixed pseudo-random subset of that size."""
    note: str = ""
    """What a reader of numbers from it should know."""


DATASETS: Registry[DatasetSpec] = Registry("dataset")
"""Every dataset that a task may name."""

_Maps = dict[str, tuple[int, ...]]
_DIGIT: _Maps = {"parity": (0, 1) * 5, "ge5": (0,) * 5 + (1,) * 5}
_ANIMAL: _Maps = {"animal": (0, 0, 1, 1, 1, 1, 1, 1, 0, 0)}
_HAIR = ("Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")

_CELEBA = DatasetSpec(
    name="celeba",
    hub_id="flwrlabs/celeba",
    folder="img_align+identity+attr",
    test_split="test",
    label_columns=("Male",),
    attribute_columns=("Male", "Smiling", "Young", "Eyeglasses", *_HAIR),
    classes=2,
    input=InputSpec(shape=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    fit=True,
    max_examples=20_000,
    note="Liu et al. 2015; label: attribute Male. Cut by example, so one person may be in several splits.",
)
_DIGITS = DatasetSpec(
    name="digits",
    label_maps=_DIGIT,
    classes=10,
    input=InputSpec(shape=(1, 8, 8), mean=(0.3053,), std=(0.3760,)),
    note="1,797 real 8x8 digits that travel with scikit-learn: for demonstrations, never ranked.",
)
_MNIST = DatasetSpec(
    name="mnist",
    hub_id="ylecun/mnist",
    folder="mnist",
    test_split="test",
    label_maps=_DIGIT,
    classes=10,
    input=InputSpec(shape=(1, 28, 28), mean=(0.1307,), std=(0.3081,)),
)
_CIFAR10 = DatasetSpec(
    name="cifar10",
    hub_id="uoft-cs/cifar10",
    folder="plain_text",
    test_split="test",
    image_column="img",
    label_maps=_ANIMAL,
    classes=10,
    input=InputSpec(shape=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    note="JPEG re-encodings are in circulation; compare fingerprints before comparing numbers.",
)


def _maps_as_task(source: DatasetSpec, label_map: str) -> DatasetSpec:
    """Return ``source`` with one of its label maps as the main task."""
    classes = len(set(source.label_maps[label_map]))
    fields = {"name": f"{source.name}_{label_map}", "main_task": label_map, "classes": classes}
    return source.model_copy(update=fields)


for _spec in (
    _DIGITS,
    _maps_as_task(_DIGITS, "parity"),
    _MNIST,
    _maps_as_task(_MNIST, "parity"),
    _CIFAR10,
    _maps_as_task(_CIFAR10, "animal"),
    DatasetSpec(
        name="fashion_mnist",
        hub_id="zalando-datasets/fashion_mnist",
        folder="fashion_mnist",
        test_split="test",
        classes=10,
        input=InputSpec(shape=(1, 28, 28), mean=(0.2860,), std=(0.3530,)),
    ),
    DatasetSpec(
        name="cifar100",
        hub_id="uoft-cs/cifar100",
        folder="cifar100",
        test_split="test",
        image_column="img",
        label_columns=("fine_label",),
        attribute_columns=("coarse_label",),
        classes=100,
        input=InputSpec(shape=(3, 32, 32), mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    ),
    DatasetSpec(
        name="svhn",
        hub_id="ufldl-stanford/svhn",
        folder="cropped_digits",
        test_split="test",
        label_maps=_DIGIT,
        classes=10,
        input=InputSpec(shape=(3, 32, 32), mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)),
    ),
    DatasetSpec(
        name="tiny_imagenet",
        hub_id="zh-plus/tiny-imagenet",
        folder="data",
        test_split="valid",
        classes=200,
        input=InputSpec(shape=(3, 64, 64), mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821)),
        max_examples=30_000,
    ),
    DatasetSpec(
        name="imagenet",
        hub_id="ILSVRC/imagenet-1k",
        folder="data",
        train_split="validation",
        classes=1000,
        input=InputSpec(shape=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        fit=True,
        max_examples=10_000,
        note="The validation split only.",
    ),
    _CELEBA,
    _CELEBA.model_copy(
        update={
            "name": "celeba_hair",
            "label_columns": _HAIR,
            "classes": len(_HAIR) + 1,
            "note": "CelebA with the hair color as label; the last class is none or several of the five.",
        }
    ),
):
    DATASETS.register(_spec.name, _spec)
