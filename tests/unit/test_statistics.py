from __future__ import annotations

import pytest
import torch

from leakbench.federation.statistics import batch_statistics
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture


def test_batch_statistics_are_the_moments_of_what_enters_each_layer():
    model = build_model(Architecture(name="resnet20"), (3, 16, 16), 10, seeds=[0, 1]).to(dtype=torch.float64)
    inputs = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    found = batch_statistics(model, inputs)
    stem = min((name for name in found if name.endswith("running_mean")), key=list(model.buffers).index)
    convolution = next(name for name in model.parameters if name.endswith("weight"))
    for trial in range(2):
        weight = model.parameters[convolution][trial]
        entering = torch.nn.functional.conv2d(inputs[trial], weight, padding=weight.shape[-1] // 2)
        flat = entering.transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[stem][trial], flat.mean(1))
        torch.testing.assert_close(found[stem.replace("mean", "var")][trial], flat.var(1))


def test_a_net_without_batch_norm_has_no_statistics():
    model = build_model(Architecture(name="mlp"), (1, 8, 8), 10, seeds=[0])
    assert batch_statistics(model, torch.randn(1, 2, 1, 8, 8)) == {}


@pytest.mark.parametrize("granted", ["running", "updated_running", "exact_batch"])
def test_granted_statistics_reach_the_attack(tmp_path, granted):
    from leakbench import Task, evaluate
    from leakbench.tasks import BatchSpec, Protocol, ThreatModel

    file = tmp_path / "counts_statistics.py"
    file.write_text(
        "import torch\n"
        "from leakbench import Attack, Recovery\n"
        "class Counts(Attack):\n"
        "    '''Claims label 0 once for every granted statistic that is not the model's own.'''\n"
        "    recovers = frozenset({'labels'})\n"
        "    needs = frozenset({'bn_statistics'})\n"
        "    reads = ('head.weight',)\n"
        "    def run(self, observation):\n"
        "        own = observation.model.buffers\n"
        "        changed = sum(not torch.equal(v.expand_as(own[n]) if v.shape[0] == 1 else v, own[n].expand_as(v))\n"
        "                      for n, v in observation.bn_statistics.items())\n"
        "        counts = torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.int64)\n"
        "        counts[:, :, 0] = changed\n"
        "        return Recovery(label_counts=counts, visible_loss=counts[:, 0, 0].float())\n"
    )
    task = Task(
        dataset="digits",
        architecture=Architecture(name="resnet20"),
        batch=BatchSpec(size=8),
        protocol=Protocol(batch_norm="train"),
        threat_model=ThreatModel(bn_statistics=granted),
    )
    rows = evaluate(f"{file}:Counts", task, trials=2, isolation="none")
    assert rows["status"].tolist() == ["ok", "ok"], rows["error"].tolist()
    assert (rows["visible_loss"] == 0).all() == (granted == "running")
