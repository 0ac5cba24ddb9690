from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from leakbench.errors import Unavailable, UserError
from leakbench.federation.inputs import to_inputs, to_pixels
from leakbench.models import recipe, stages
from leakbench.models.functional import build_model
from leakbench.models.stages import checkpoint, lock_checkpoint
from leakbench.tasks import Architecture, InputSpec

MLP = Architecture(name="mlp", params={"width": 8})


@dataclass
class Toy:
    """Two classes that differ in brightness."""

    fingerprint: str = "toy"
    num_classes: int = 2
    labels: np.ndarray = field(default_factory=lambda: np.arange(80, dtype=np.int64) % 2)

    @property
    def input_spec(self):
        return InputSpec(shape=(1, 4, 4), mean=(0.5,), std=(0.25,))

    @property
    def images(self):
        noise = np.random.default_rng(0).integers(0, 100, (80, 1, 4, 4))
        return (noise + 100 * self.labels[:, None, None, None]).astype(np.uint8)

    @property
    def splits(self):
        return {"private": np.arange(0, 60), "test": np.arange(60, 80)}


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "_LEAST_STEPS", 100)
    monkeypatch.setattr(stages, "tasks_folder", lambda: tmp_path / "tasks")


def get(stage, tmp_path, draw=0, architecture=MLP, data=None, normalise=True):
    return checkpoint(architecture, data or Toy(), stage, draw, normalise=normalise, cache=tmp_path / "cache")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stages_are_points_of_one_run(tmp_path):
    run = {s.stage: s for s in recipe.train(MLP, Toy(), 0, normalise=True)}
    assert list(run) == ["early", "mid", "converged"]
    for stage, snapshot in run.items():
        made = get(stage, tmp_path)
        assert equal(made.tensors, snapshot.tensors)
        assert made.accuracy == snapshot.accuracy
    assert run["converged"].accuracy > 0.9
    assert not equal(run["early"].tensors, run["mid"].tensors)


def test_training_again_gives_the_same_file_and_leaves_global_state(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = get("mid", tmp_path / "a"), get("mid", tmp_path / "b")
    assert first.sha256 == second.sha256
    assert (torch.equal(torch.get_rng_state(), state), torch.get_num_threads()) == (True, threads)


def test_draws_normalisation_data_and_architecture_have_their_own_weights(tmp_path):
    hashes = {
        get("early", tmp_path).sha256,
        get("early", tmp_path, draw=1).sha256,
        get("early", tmp_path, normalise=False).sha256,
        get("early", tmp_path, architecture=Architecture(name="mlp", params={"width": 9})).sha256,
        get("early", tmp_path, data=Toy(fingerprint="other")).sha256,
    }
    assert len(hashes) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_the_cache_is_used_and_a_damaged_file_is_replaced(tmp_path, monkeypatch):
    first = get("converged", tmp_path)
    assert first.origin == "local"
    files = sorted((tmp_path / "cache").iterdir())
    first.path.write_bytes(first.path.read_bytes()[:-1] + b"x")
    assert get("converged", tmp_path).sha256 == first.sha256
    assert sorted((tmp_path / "cache").iterdir()) == files
    monkeypatch.setattr(stages, "train", None)  # from here on everything comes from the cache
    again = get("converged", tmp_path)
    assert equal(again.tensors, first.tensors)
    assert (again.sha256, again.accuracy, again.path) == (first.sha256, first.accuracy, first.path)


def test_weights_fit_the_model_they_are_for(tmp_path):
    net = Architecture(name="resnet20", params={"width": 2})
    made = get("early", tmp_path, architecture=net)
    model = build_model(net, (1, 4, 4), 2, state=made.tensors)
    assert model.buffers["body.1.num_batches_tracked"].item() == 2
    data = Toy()
    inputs = to_inputs(data.images[60:], data.input_spec, True)
    hits = (model.logits(inputs[None])[0].argmax(1).numpy() == data.labels[60:]).mean()
    assert hits == pytest.approx(made.accuracy)


def test_official_checkpoints_win_and_must_match_their_hash(tmp_path):
    local = get("early", tmp_path)
    file = lock_checkpoint(MLP, Toy(), "early", 0, normalise=True, tasks=tmp_path / "tasks", cache=tmp_path / "cache")
    official = get("early", tmp_path)
    assert (official.origin, official.sha256, official.path) == ("official", local.sha256, file)
    assert get("early", tmp_path, draw=1).origin == "local"
    pins = json.loads((tmp_path / "tasks" / "tasks.lock").read_text())
    assert [list(v) for v in pins["checkpoints"].values()] == [["early"]]
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"expected sha256 {local.sha256}"):
        get("early", tmp_path)


def test_untrained_weights_are_those_of_build_model(tmp_path):
    made = get("untrained", tmp_path, draw=17)
    assert made.origin == "init"
    expected = build_model(MLP, (1, 4, 4), 2, seeds=[recipe.init_seed(MLP, Toy(), 17)])
    assert equal(made.tensors, expected.tensors())


def test_pretrained_weights_that_cannot_be_had_are_unavailable(tmp_path, monkeypatch):
    downloads = []

    def download(architecture, *_):
        if "pretrained" in architecture.params:
            downloads.append(architecture.name)
            raise OSError("no route to host")

    monkeypatch.setattr(stages, "build_module", download)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no route to host"):
            get("pretrained", tmp_path, architecture=Architecture(name="torchvision/resnet18"))
    assert downloads == ["torchvision/resnet18"]
    with pytest.raises(UserError, match="torchvision/NAME or timm/NAME"):
        get("pretrained", tmp_path)


@pytest.mark.parametrize(("stage", "draw", "message"), [("midd", 0, "Did you mean 'mid'"), ("mid", 3, "draws 0 to 2")])
def test_unknown_stage_or_draw_is_one_clear_line(tmp_path, stage, draw, message):
    with pytest.raises(UserError, match=message):
        get(stage, tmp_path, draw)


@pytest.mark.parametrize("normalise", [True, False])
def test_pixels_make_the_round_trip(normalise):
    spec = InputSpec(shape=(3, 2, 2), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = np.random.default_rng(1).integers(0, 256, (4, 5, 3, 2, 2), dtype=np.uint8)
    inputs = to_inputs(images, spec, normalise)
    assert inputs.dtype == torch.float32
    expected = images / 255
    if normalise:
        expected = (expected - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_pixels(inputs, spec, normalise).numpy() * 255, images, atol=1e-3)
    assert to_pixels(inputs * 100, spec, normalise).max() == 1


# --- runs of plain SGD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "lenet_zhu"])
def test_a_point_of_sgd_does_not_depend_on_which_points_were_made_before(tmp_path, name):
    net = Architecture(name=name, init="uniform(0.5)")
    straight = get("sgd(steps=30)", tmp_path / "one", architecture=net)
    for stage in ("sgd(steps=7)", "sgd(steps=40)", "sgd(steps=21)", "sgd(steps=7, lr=0.5)"):
        get(stage, tmp_path / "two", architecture=net)
    resumed = get("sgd(steps=30)", tmp_path / "two", architecture=net)
    assert equal(straight.tensors, resumed.tensors)
    assert straight.accuracy == resumed.accuracy
    assert straight.sha256 == resumed.sha256


@pytest.mark.parametrize(
    ("stage", "batch", "options", "drops"),
    [
        ("sgd(steps=10)", 8, {"lr": 0.1}, []),
        ("sgd(steps=16, lr=0.05, batch_size=60, momentum=0.9, weight_decay=0.01, drops=true)", 60,
         {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, [6, 10, 14]),
    ],
)  # fmt: skip
def test_sgd_is_torchs_on_full_batches(tmp_path, monkeypatch, stage, batch, options, drops):
    seen = []
    monkeypatch.setattr(recipe, "_examples", lambda data, rows, *_: seen.append(rows) or real(data, rows, True))
    real = _examples
    made = get(stage, tmp_path)
    steps = [rows for rows in seen if len(rows) == batch][: len(seen) - 1]  # the last one measures accuracy
    module = recipe.initialised(MLP, (1, 4, 4), 2, recipe.init_seed(MLP, Toy(), 0)).requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), **options)
    for step, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = options["lr"] * 0.1 ** sum(step >= drop for drop in drops)
        optimizer.zero_grad()
        inputs, labels = real(Toy(), rows, True)
        torch.nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(made.tensors[f"parameter/{name}"][0], value.detach())
    per_pass = 60 // batch
    for first in range(0, len(steps) - per_pass, per_pass):
        assert len(torch.cat(steps[first : first + per_pass]).unique()) == batch * per_pass


_examples = recipe._examples


def test_augmented_images_are_shifted_by_at_most_4_pixels_and_flipped_half_of_the_time():
    image = np.arange(1, 31, dtype=np.uint8).reshape(1, 1, 5, 6)
    shifted = recipe._shifted_and_flipped(np.repeat(image, 4000, axis=0), torch.Generator().manual_seed(0))
    seen = {each.tobytes() for each in shifted}
    canvas = np.zeros((1, 13, 14), dtype=np.uint8)
    canvas[:, 4:9, 4:10] = image[0]
    crops = [canvas[:, i : i + 5, j : j + 6] for i in range(9) for j in range(9)]
    assert seen == {each.tobytes() for crop in crops for each in (crop, crop[:, :, ::-1])}
