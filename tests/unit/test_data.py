"""Splits, fingerprints and the errors of loading, on digits and on made-up files."""

from __future__ import annotations

import dataclasses
import io
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from leakbench.data import DATASETS, Dataset, decoder_versions, hub, load_dataset
from leakbench.errors import Unavailable, UserError


def encoded(size=(28, 28), value=0, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(root, split, images, labels, hub="ylecun/mnist/mnist", **columns):
    file = root / hub / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), file)
    return file


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Twenty train and four test images whose pixels tell which one they are."""
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path))
    write(tmp_path, "train", [encoded(value=i) for i in range(20)], [i % 10 for i in range(20)])
    write(tmp_path, "test", [encoded(value=100 + i) for i in range(4)], [0, 1, 2, 3])
    return tmp_path


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def one_line(name):
    with pytest.raises(UserError) as caught:
        load_dataset(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_importing_data_imports_no_heavy_library():
    heavy = ["torch", "datasets", "sklearn", "scipy", "pyarrow"]
    code = f"import sys, leakbench.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_digits_are_what_scikit_learn_loads():
    from sklearn.datasets import load_digits

    digits, reference = load_dataset("digits"), load_digits()
    expected = np.rint(reference.images * 255 / 16)
    ours = sorted((image.tobytes(), label) for image, label in zip(digits.images, digits.labels, strict=True))
    theirs = sorted(
        (image.astype(np.uint8).tobytes(), label) for image, label in zip(expected, reference.target, strict=True)
    )
    assert digits.images.dtype == np.uint8
    assert digits.images.shape == (1797, 1, 8, 8)
    assert ours == theirs


def test_splits_are_disjoint_and_complete():
    digits = load_dataset("digits")
    rows = np.concatenate(list(digits.splits.values()))
    assert sorted(rows) == list(range(1797))
    assert {name: len(r) for name, r in digits.splits.items()} == {"private": 1078, "auxiliary": 359, "test": 360}


def test_the_cut_never_changes():
    # A change here changes every victim of every row there is.
    assert load_dataset("digits").fingerprint == "24477f0529b1bc3c25254514406bd35362bdcd815aff979db74a27dc615fb0ca"


def test_source_test_split_stays_test_and_train_is_cut(mnist):
    data = load_dataset("mnist")
    pixels = {name: set(data.images[rows, 0, 0, 0].tolist()) for name, rows in data.splits.items()}
    assert pixels["test"] == {100, 101, 102, 103}
    assert pixels["private"] | pixels["auxiliary"] == set(range(20))
    assert len(pixels["private"]) == 16
    assert len(pixels["auxiliary"]) == 4


def test_images_keep_their_labels_and_maps(mnist):
    data = load_dataset("mnist")
    train = np.concatenate([data.splits["private"], data.splits["auxiliary"]])
    assert np.array_equal(data.labels[train], data.images[train, 0, 0, 0] % 10)
    assert np.array_equal(data.attributes["parity"], data.labels % 2)


def test_class_prior_is_the_frequency_in_the_split(mnist):
    data = load_dataset("mnist")
    assert np.array_equal(data.class_prior("test"), [0.25] * 4 + [0] * 6)


def test_local_files_need_no_network_and_leave_no_cache(mnist, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("network used")

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_dataset("mnist")
    assert list(scratch.iterdir()) == []


def test_one_pixel_or_one_label_changes_the_fingerprint(tmp_path):
    x, y = np.zeros((10, 4, 4), np.uint8), np.arange(10) % 2
    reference = load_dataset(save(tmp_path / "a.npz", x=x, y=y)).fingerprint
    assert load_dataset(save(tmp_path / "b.npz", x=x, y=y)).fingerprint == reference
    x[3, 1, 1] = 1
    assert load_dataset(save(tmp_path / "c.npz", x=x, y=y)).fingerprint != reference
    x[3, 1, 1], y[0] = 0, 1
    assert load_dataset(save(tmp_path / "d.npz", x=x, y=y)).fingerprint != reference


def test_a_rewritten_npz_is_read_again(tmp_path):
    path = tmp_path / "a.npz"
    first = load_dataset(save(path, x=np.zeros((10, 4, 4), np.uint8), y=np.arange(10)))
    second = load_dataset(save(path, x=np.ones((12, 4, 4), np.uint8), y=np.arange(12)))
    assert (len(first.images), len(second.images)) == (10, 12)


@pytest.mark.parametrize("layout", ["nhw", "nchw", "nhwc"])
def test_npz_layouts_become_channels_first(tmp_path, layout):
    images = np.random.default_rng(0).random((10, 1 if layout == "nhw" else 3, 5, 6))
    x = {"nhw": images[:, 0], "nchw": images, "nhwc": np.moveaxis(images, 1, 3)}[layout]
    data = load_dataset(save(tmp_path / "a.npz", x=x, y=np.arange(10)))
    assert data.input_spec.shape == images.shape[1:]
    assert np.abs(data.images - images[data.labels] * 255).max() <= 0.5


def test_loaded_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        load_dataset("digits").images[0] = 0


def test_max_examples_caps_what_is_decoded_without_moving_the_cut(mnist, monkeypatch):
    broken = [encoded(value=i) for i in range(20)]
    whole = load_dataset("mnist")
    kept = set(whole.images[whole.splits["private"][:8], 0, 0, 0].tolist())
    for i in set(range(20)) - kept:
        broken[i] = {"bytes": b"not an image", "path": None}
    write(mnist, "train", broken, [i % 10 for i in range(20)])
    capped = DATASETS.get("mnist").model_copy(update={"max_examples": 8})
    monkeypatch.setitem(DATASETS._items, "capped", capped)
    data = load_dataset("capped")
    assert set(data.images[data.splits["private"], 0, 0, 0].tolist()) < kept
    assert len(data.splits["private"]) + len(data.splits["auxiliary"]) == 8


def test_several_boolean_columns_make_one_label(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path))
    hair = DATASETS.get("celeba_hair")
    flags = {name: [False] * 4 for name in hair.attribute_columns}
    flags["Bald"][1] = flags["Gray_Hair"][2] = flags["Bald"][3] = flags["Gray_Hair"][3] = True
    images = [encoded((178, 218), value=i, mode="RGB") for i in range(4)]
    for split in ("train", "test"):
        write(tmp_path, split, images, [0] * 4, hub=f"{hair.hub_id}/{hair.folder}", **flags)
    data = load_dataset("celeba_hair")
    assert data.images.shape[1:] == (3, 64, 64)
    assert dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == {0: 5, 1: 0, 2: 4, 3: 5}


def test_catalogue_is_consistent():
    for name in DATASETS:
        spec = DATASETS.get(name)
        assert spec.name == name
        source = len(spec.label_maps[spec.main_task]) if spec.main_task else spec.classes
        assert all(len(values) == source for values in spec.label_maps.values())
        assert not spec.main_task or set(spec.label_maps[spec.main_task]) == set(range(spec.classes))
        assert {len(spec.input.mean), len(spec.input.std)} == {spec.input.shape[0]}


def test_decoder_versions_name_pillow():
    assert decoder_versions().startswith("pillow ")


def test_unknown_name_suggests():
    assert "Did you mean 'cifar10'?" in one_line("cifar-10")


def test_missing_dataset_names_id_folder_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path))
    message = one_line("svhn")
    assert "ufldl-stanford/svhn" in message
    assert str(tmp_path) in message
    assert "hf download --repo-type dataset ufldl-stanford/svhn" in message


def test_missing_split_is_named(mnist):
    (mnist / "ylecun/mnist/mnist/test-00000-of-00001.parquet").unlink()
    assert "split 'test' of dataset mnist" in one_line("mnist")


def test_data_directory_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path / "nowhere"))
    assert "LEAKBENCH_DATA: expected a directory" in one_line("mnist")


@pytest.mark.parametrize("keep", [0, 10, -10])
def test_truncated_parquet_is_named(mnist, keep):
    file = mnist / "ylecun/mnist/mnist/test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    message = one_line("mnist")
    assert str(file) in message
    assert "cannot be read as Parquet" in message


def test_missing_column_is_named(mnist):
    file = mnist / "ylecun/mnist/mnist/train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).rename_columns(["img", "label"]), file)
    assert "expected column 'image', got img, label" in one_line("mnist")


def test_mixed_sizes_name_both_and_the_file(mnist):
    file = write(mnist, "train", [encoded()] * 5 + [encoded((30, 28))], [0] * 6)
    message = one_line("mnist")
    assert "28x28" in message
    assert "30x28 in row 5" in message
    assert str(file) in message


def test_broken_image_names_row_and_file(mnist):
    file = write(mnist, "train", [encoded()] * 5 + [{"bytes": b"nonsense", "path": None}], [0] * 6)
    message = one_line("mnist")
    assert str(file) in message
    assert "row 5" in message


@pytest.mark.parametrize("images", [[1, 2, 3], ["a", "b", "c"], [None, encoded(), encoded()]])
def test_columns_without_images_are_one_line(mnist, images):
    file = write(mnist, "train", images, [0, 1, 2])
    message = one_line("mnist")
    assert str(file) in message
    assert "expected image" in message or "expected an image" in message


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range(mnist, label):
    write(mnist, "train", [encoded()] * 5, [0, 1, 2, 3, label])
    assert f"expected labels 0 to 9, got {label}" in one_line("mnist")


@pytest.mark.parametrize("labels", [[0, 1, None, 2, 3], ["a"] * 5])
def test_labels_that_are_no_numbers(mnist, labels):
    write(mnist, "train", [encoded()] * 5, labels)
    assert "expected whole numbers in column 'label'" in one_line("mnist")


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": np.zeros((5, 4, 4), np.uint8), "y": np.arange(5)}, "expected arrays x and y, got images, y"),
        ({"x": np.zeros((5, 4, 4), np.uint8), "y": np.arange(4)}, "with shape (5,)"),
        ({"x": np.zeros((5, 4, 4), np.uint8), "y": np.arange(5.0)}, "whole numbers"),
        ({"x": np.zeros((5, 4, 4), np.uint8), "y": np.arange(5) - 1}, "got -1"),
        ({"x": np.zeros((5, 16), np.uint8), "y": np.arange(5)}, "expected x of shape"),
        ({"x": np.zeros((5, 2, 6, 6), np.uint8), "y": np.arange(5)}, "expected x of shape"),
        ({"x": np.full((5, 4, 4), 255.0), "y": np.arange(5)}, "floats in [0, 1]"),
        ({"x": np.full((5, 4, 4), np.nan), "y": np.arange(5)}, "floats in [0, 1]"),
        ({"x": np.array([None] * 5), "y": np.arange(5)}, "cannot be read as .npz"),
    ],
)
def test_bad_npz_is_one_line(tmp_path, arrays, expected):
    assert expected in one_line(save(tmp_path / "a.npz", **arrays))


def test_npz_that_is_missing_or_no_npz(tmp_path):
    assert "expected an .npz file" in one_line(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("hello")
    assert "cannot be read as .npz" in one_line(str(tmp_path / "text.npz"))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    assert "not a zip archive" in one_line(str(tmp_path / "plain.npz"))


def test_unknown_or_empty_split_is_one_line():
    digits = load_dataset("digits")
    empty: Dataset = dataclasses.replace(digits, splits={**digits.splits, "test": np.arange(0)})
    with pytest.raises(UserError, match="no examples in split 'validation'; expected one of: private, auxiliary, test"):
        digits.rows("validation")
    with pytest.raises(UserError, match=r"expected one of: private, auxiliary$"):
        empty.class_prior("test")


def test_a_hub_out_of_reach_is_tried_once_and_every_dataset_says_what_to_type(monkeypatch):
    import datasets

    tried = []

    def unreachable(source, **_):
        tried.append(source)
        raise ConnectionError("no route to host")

    monkeypatch.delenv("LEAKBENCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(hub, "_hub_errors", [])
    for name in ("svhn", "cifar100", "svhn"):
        with pytest.raises(Unavailable, match=f"{name}.*no route to host.*hf download"):
            load_dataset(name)
    assert tried == ["ufldl-stanford/svhn"]
