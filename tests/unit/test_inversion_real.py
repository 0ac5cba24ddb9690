"""Image attacks on CIFAR-10, where it is at hand: $LEAKBENCH_DATA or shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dlg import DLG
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients

from leakbench.data import load_dataset
from leakbench.tasks import Architecture

ROOT = Path(os.environ.get("LEAKBENCH_DATA") or Path(__file__).parents[3] / "shared" / "data").resolve()


@pytest.fixture
def cifar10(monkeypatch):
    if not (ROOT / "uoft-cs" / "cifar10").is_dir():
        pytest.skip("no uoft-cs/cifar10 in LEAKBENCH_DATA or in shared/data beside the checkout")
    monkeypatch.setenv("LEAKBENCH_DATA", str(ROOT))
    data = load_dataset("cifar10")
    rows = data.splits["private"][:1500]
    return torch.tensor(data.images[rows]) / 255, torch.tensor(data.labels[rows])


@pytest.mark.slow
def test_dlg_recovers_cifar_images_on_the_sigmoid_lenet(cifar10, one_thread):
    observation, true, _ = observe(trials=16, own_models=True, labels=False, dtype=torch.float32, dataset=cifar10)
    recovery = DLG(steps=250, restarts=4).run(observation)
    assert (psnr(recovery.inputs, true) > 30).sum() >= 12


@pytest.mark.slow
def test_inverting_gradients_beats_dlg_on_a_relu_resnet(cifar10, one_thread):
    net = Architecture(name="resnet20")
    observation, true, _ = observe(trials=2, net=net, dtype=torch.float32, dataset=cifar10)
    inverting = psnr(InvertingGradients(steps=600, tv=1e-2).run(observation).inputs, true)
    deep = psnr(DLG(steps=30, labels="idlg").run(observation).inputs, true)
    assert (inverting > deep + 1).all()
