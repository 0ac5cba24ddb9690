"""Datasets as uint8 arrays in memory, cut into private, auxiliary and test splits that every machine cuts equally."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from leakbench import keys
from leakbench.data.catalogue import DATASETS, SOURCE_CLASS, DatasetSpec
from leakbench.data.hub import Columns, Rows, read_split
from leakbench.errors import UserError, unknown
from leakbench.tasks import AttributeSpec, InputSpec

PRIVATE_OF_TRAIN = 0.8
"""Share of a source train split that becomes private; the rest is auxiliary."""
SHARES_OF_ONE = (0.6, 0.2, 0.2)
"""Private, auxiliary and test shares where the source has one split only."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A loaded dataset; its arrays are read-only.

    Args:
        spec: What it is.
        images: uint8 (n, *shape), all splits.
        labels: int64 (n,).
        splits: ``private``, ``auxiliary`` and ``test``: disjoint int64 indices into the first axis.
        attributes: int64 (n,) for each attribute column and label map of ``spec``, and ``class``, the source's label.
    """

    spec: DatasetSpec
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    splits: Mapping[str, Rows]
    attributes: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    @property
    def input_spec(self) -> InputSpec:
        """What one input is."""
        return self.spec.input

    @property
    def num_classes(self) -> int:
        """C."""
        return self.spec.classes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over shape, split sizes, decoded pixel values and labels of everything loaded."""
        sizes = {name: len(rows) for name, rows in self.splits.items()}
        digest = hashlib.sha256(json.dumps([self.images.shape, self.num_classes, sizes], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def rows(self, split: str) -> Rows:
        """Return the indices of a split.

        Raises:
            UserError: There is no such split, or it is empty.
        """
        if len(self.splits.get(split, ())) == 0:
            known = ", ".join(name for name, rows in self.splits.items() if len(rows))
            raise UserError(f"dataset {self.spec.name} has no examples in split {split!r}; expected one of: {known}")
        return self.splits[split]

    def has(self, attribute: AttributeSpec) -> npt.NDArray[np.bool_]:
        """Return which examples have an attribute, bool (n,).

        Raises:
            UserError: The dataset has no such attribute.
        """
        if attribute.name not in self.attributes:
            raise unknown(f"attribute of dataset {self.spec.name}", attribute.name, self.attributes)
        return np.asarray(self.attributes[attribute.name] == attribute.value)

    def class_prior(self, split: str = "private") -> npt.NDArray[np.float64]:
        """Return the relative frequency of each class in a split, (C,)."""
        labels = self.labels[self.rows(split)]
        return np.bincount(labels, minlength=self.num_classes) / len(labels)


def load_dataset(name: str) -> Dataset:
    """Load a dataset by name, or an ``.npz`` file with images ``x`` and labels ``y``.

    Loaded datasets are kept in the process. With LEAKBENCH_DATA set, ``$LEAKBENCH_DATA/<hub id>`` is read instead of
    the hub.

    Args:
        name: A name in `DATASETS` or a path that ends in ``.npz``. There, ``x`` is uint8, or floats in [0, 1], of
            shape (n, C, H, W), (n, H, W, C) or (n, H, W) with 1, 3 or 4 channels, and ``y`` whole numbers (n,).

    Raises:
        Unavailable: The dataset is not at hand.
        UserError: The name is unknown, or files are damaged or not as expected.
    """
    if name.endswith(".npz"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"dataset {name}: expected an .npz file, got none there; check the path")
        return _load_npz(name, path.stat().st_mtime_ns)
    root = os.environ.get("LEAKBENCH_DATA") if DATASETS.get(name).hub_id else None
    return _load_named(name, root)


def decoder_versions() -> str:
    """Return the versions of what turns files into pixels: they are part of a row's provenance."""
    from PIL import __version__, features

    codecs = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "jpg", "zlib") if features.check(name)]
    return ", ".join([f"pillow {__version__}", *codecs])


@functools.lru_cache(maxsize=4)
def _load_named(name: str, root: str | None) -> Dataset:
    spec = DATASETS.get(name)
    if spec.hub_id is None:
        images, labels = _digits()
        return _cut_one(spec, images, {"label": labels})
    directory = Path(root) if root else None
    if directory and not directory.is_dir():
        raise UserError(f"LEAKBENCH_DATA: expected a directory, got {directory}; unset it to read from the hub")
    images, columns = read_split(spec, spec.train_split, directory, lambda n: _order(n, spec.max_examples))
    if spec.test_split is None:
        return _assemble(spec, images, columns, _sizes(len(images)))
    private = round(PRIVATE_OF_TRAIN * len(images))
    test_images, test_columns = read_split(spec, spec.test_split, directory, np.arange)
    sizes = (private, len(images) - private, len(test_images))
    merged = {name: np.concatenate([values, test_columns[name]]) for name, values in columns.items()}
    return _assemble(spec, np.concatenate([images, test_images]), merged, sizes)


def _order(n: int, cap: int | None) -> Rows:
    """Return a fixed pseudo-random order of ``n`` rows, cut to ``cap``; raw words, since shuffles change with NumPy."""
    key = int.from_bytes(keys.derive(keys.PUBLIC_KEY, "split", n)[:16], "little")
    words = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable")[:cap].astype(np.int64)


def _sizes(n: int) -> tuple[int, int, int]:
    private, auxiliary = (round(share * n) for share in SHARES_OF_ONE[:2])
    return private, auxiliary, n - private - auxiliary


def _cut_one(spec: DatasetSpec, images: npt.NDArray[np.uint8], columns: Columns) -> Dataset:
    order = _order(len(images), spec.max_examples)
    columns = {name: values[order] for name, values in columns.items()}
    return _assemble(spec, images[order], columns, _sizes(len(order)))


def _assemble(
    spec: DatasetSpec, images: npt.NDArray[np.uint8], columns: Columns, sizes: tuple[int, int, int]
) -> Dataset:
    """Build the dataset from rows that are already in the order private, auxiliary, test."""
    labels = columns[spec.label_columns[0]]
    if len(spec.label_columns) > 1:
        flags = np.stack([columns[name] != 0 for name in spec.label_columns], axis=1)
        labels = np.where(flags.sum(axis=1) == 1, flags.argmax(axis=1), len(spec.label_columns)).astype(np.int64)
    classes = len(spec.label_maps[spec.main_task]) if spec.main_task else spec.classes
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise UserError(
            f"dataset {spec.name}: expected labels 0 to {classes - 1}, got {wrong}; "
            "drop unlabelled examples or correct the labels"
        )
    attributes = {SOURCE_CLASS: labels} | {name: columns[name] for name in spec.attribute_columns}
    attributes |= {name: np.asarray(values, dtype=np.int64)[labels] for name, values in spec.label_maps.items()}
    if spec.main_task:
        labels = attributes[spec.main_task]
    bounds = np.cumsum((0, *sizes))
    splits = {
        name: np.arange(bounds[i], bounds[i + 1], dtype=np.int64)
        for i, name in enumerate(("private", "auxiliary", "test"))
    }
    # The process shares one copy, so a caller that wrote into it would change every later task.
    images.setflags(write=False)
    for array in (labels, *splits.values(), *attributes.values()):
        array.setflags(write=False)
    return Dataset(spec, images, labels, splits, attributes)


def _digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    # The file that sklearn.datasets.load_digits reads; importing sklearn.datasets takes seconds, this milliseconds.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UserError("dataset digits: expected scikit-learn to be installed; type: pip install scikit-learn")
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    images = np.rint(table[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images, table[:, -1].astype(np.int64)


@functools.lru_cache(maxsize=4)
def _load_npz(name: str, _modified: int) -> Dataset:
    try:
        # Checked first, since np.load takes a plain .npy array or a pickle as well.
        if not zipfile.is_zipfile(name):
            raise ValueError("not a zip archive")
        with np.load(name, allow_pickle=False) as arrays:
            missing = {"x", "y"} - set(arrays.files)
            if missing:
                raise UserError(
                    f"dataset {name}: expected arrays x and y, got {', '.join(arrays.files) or 'none'}; "
                    "save with numpy.savez(path, x=images, y=labels)"
                )
            x, y = arrays["x"], arrays["y"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"dataset {name}: cannot be read as .npz ({' '.join(str(error).split())}); "
            "save with numpy.savez(path, x=images, y=labels)"
        ) from None
    images = _pixels(name, x)
    if y.shape != (len(images),) or y.dtype.kind not in "iu":
        raise UserError(
            f"dataset {name}: expected y of whole numbers with shape ({len(images)},), got {y.dtype} {y.shape}; "
            "give one class index per image"
        )
    labels = y.astype(np.int64)
    if len(np.unique(labels)) < 2:
        raise UserError(f"dataset {name}: expected at least two classes in y, got {np.unique(labels)}; add another")
    spec = DatasetSpec(name=name, classes=max(1, int(labels.max()) + 1), input=InputSpec(shape=images.shape[1:]))
    return _cut_one(spec, images, {"label": labels})


def _pixels(name: str, x: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Return ``x`` as uint8 (n, C, H, W)."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4) or 0 in x.shape:
        raise UserError(
            f"dataset {name}: expected x of shape (n, C, H, W), (n, H, W, C) or (n, H, W) with 1, 3 or 4 channels, "
            f"got {x.shape}; reshape it"
        )
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x, dtype=np.uint8)
    if x.dtype.kind != "f" or not (x.min() >= 0 and x.max() <= 1):
        raise UserError(
            f"dataset {name}: expected x as uint8 or as floats in [0, 1], got {x.dtype} in "
            f"[{x.min()}, {x.max()}]; rescale it"
        )
    return np.rint(x.astype(np.float64) * 255).astype(np.uint8)
