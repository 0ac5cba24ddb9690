"""The same laws on real files, where they are at hand: $LEAKBENCH_DATA or shared/data beside the checkout."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leakbench.data import load_dataset

ROOT = Path(os.environ.get("LEAKBENCH_DATA") or Path(__file__).parents[3] / "shared" / "data").resolve()


@pytest.fixture
def real(monkeypatch):
    def load(name, folder):
        if not (ROOT / folder).is_dir():
            pytest.skip(f"no {folder} in LEAKBENCH_DATA or in shared/data beside the checkout")
        monkeypatch.setenv("LEAKBENCH_DATA", str(ROOT))
        return load_dataset(name), ROOT / folder

    return load


def decoded(folder, pattern, column):
    """Decode with pyarrow and Pillow alone: sorted (pixels, label)."""
    table = pq.read_table(sorted(folder.rglob(pattern)))
    images = (np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table[column].to_pylist())
    return sorted((image.tobytes(), label) for image, label in zip(images, table["label"].to_pylist(), strict=True))


def loaded(data, *splits):
    rows = np.concatenate([data.splits[split] for split in splits])
    images = np.moveaxis(data.images[rows], 1, 3)
    return sorted((image.tobytes(), label) for image, label in zip(images, data.labels[rows].tolist(), strict=True))


def test_mnist_holds_every_source_image_once_and_test_apart(real):
    data, folder = real("mnist", "ylecun/mnist")
    assert loaded(data, "private", "auxiliary") == decoded(folder, "train-*.parquet", "image")
    assert loaded(data, "test") == decoded(folder, "test-*.parquet", "image")


def test_cifar10_is_cut_into_four_fifths_and_one(real):
    data, folder = real("cifar10", "uoft-cs/cifar10")
    rows = sum(pq.read_metadata(file).num_rows for file in folder.rglob("train-*.parquet"))
    assert len(data.splits["private"]) == round(0.8 * rows)
    assert len(data.splits["auxiliary"]) == rows - round(0.8 * rows)
    assert len(data.splits["test"]) == sum(pq.read_metadata(file).num_rows for file in folder.rglob("test-*.parquet"))
    assert np.allclose(data.class_prior(), 0.1, atol=0.01)
    mean = data.images[data.splits["private"][:4000]].mean(axis=(0, 2, 3)) / 255
    assert np.allclose(mean, data.input_spec.mean, atol=0.01)


def test_imagenet_is_cut_from_validation_alone(real):
    data, folder = real("imagenet", "ILSVRC/imagenet-1k")
    rows = min(5_000, sum(pq.read_metadata(file).num_rows for file in folder.rglob("validation-*.parquet")))
    assert [len(data.splits[name]) for name in ("private", "auxiliary")] == [round(0.6 * rows), round(0.2 * rows)]
    assert len(data.images) == rows
    if rows < 5_000:
        assert loaded(data, "private", "auxiliary", "test") == decoded(folder, "validation-*.parquet", "image")
