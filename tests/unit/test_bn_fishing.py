"""BN fishing: exact counts behind an ideal aggregate for as many clients as there are equations, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.attacks.bn_fishing import BNFishing
from leakbench_baselines.defenses.dropout import Dropout
from torch import nn
from torch.nn import functional as F  # noqa: N812

from leakbench import Cohort, Knowledge, NotApplicable, NotGranted, Observation, UserError
from leakbench.chain import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.aggregation import StreamedSum, aggregation_weights
from leakbench.federation.client import Client
from leakbench.federation.planting import Planted
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, TRIALS, WIDTH = 5, 3, 12
SHAPES = {"mlp": (1, 4, 4), "lenet5": (1, 12, 12), "resnet20": (3, 8, 8)}
NETS = {"mlp": {"width": WIDTH, "batch_norm": True}, "lenet5": {"batch_norm": True}, "resnet20": {"width": 4}}
SERVER = ThreatModel(adversary="malicious_server", change_parameters=True, per_client=True)
TRAIN = {"batch_norm": "train"}


@dataclass
class Scene:
    """T trials of K clients with random inputs, and the ideal aggregate of what they send."""

    clients: int
    net: str = "mlp"
    batch: tuple[int, ...] = (6,)
    protocol: dict = field(default_factory=dict)
    params: dict | None = None
    models: int = 1
    threat: ThreatModel = SERVER
    defense: tuple = ()
    transform: object = None

    @property
    def facts(self):
        protocol = Protocol(clients=self.clients, secure_aggregation=self.clients > 1, **self.protocol)
        batches = [self.batch[k % len(self.batch)] for k in range(self.clients)]
        sizes = tuple(batch * protocol.local_batches for batch in batches)
        return Facts(
            granted=self.threat.granted(),
            protocol=protocol,
            input_spec=InputSpec(shape=SHAPES[self.net]),
            normalised=False,
            num_classes=CLASSES,
            clients=self.clients,
            batch_size=-(-sum(batches) // self.clients),
            inputs_per_client=-(-sum(sizes) // self.clients),
            client_sizes=sizes,
        )

    @cached_property
    def model(self):
        params = NETS[self.net] if self.params is None else self.params
        net = Architecture(name=self.net, params=params)
        return build_model(net, SHAPES[self.net], CLASSES, seeds=range(self.models), transform=self.transform)

    @cached_property
    def victims(self):
        stream = torch.Generator().manual_seed(self.clients)
        sizes = self.facts.client_sizes
        return [
            (
                torch.rand(TRIALS, size, *SHAPES[self.net], generator=stream),
                torch.randint(CLASSES, (TRIALS, size), generator=stream),
            )
            for size in sizes
        ]

    @property
    def counts(self):
        return torch.stack([F.one_hot(labels, CLASSES).sum(1) for _, labels in self.victims], 1)

    def knowledge(self, kind=Knowledge, *first, trials=TRIALS):
        seeds = torch.arange(4 * trials).view(torch.uint8).reshape(trials, 32)
        return kind(*first, facts=self.facts, random=TrialRandom(seeds), model=self.model)

    def prepare(self, attack):
        return attack.prepare(self.knowledge(trials=self.models))

    def planted(self, attack, prepared):
        return Planted(self.model, attack.plant(self.model, self.knowledge(Cohort, prepared), []), self.clients)

    def sent(self, planted):
        facts = self.facts
        total = StreamedSum(aggregation_weights(facts.protocol, facts.client_sizes))
        names = [name for name in self.model.parameters if name.startswith("fc.")]
        for k, (inputs, labels) in enumerate(self.victims):
            size = facts.client_sizes[k] // facts.protocol.local_batches
            client = Client(facts.protocol, size, DefenseChain(self.defense))
            random = self.knowledge()._random.at(k)
            total.add(client.update(planted.model_of(k), inputs, labels, random=random, names=names, client=k))
        return total.mean()

    def run(self, attack, update=None):
        prepared = self.prepare(attack)
        planted = self.planted(attack, prepared)
        seen = Seen([update or self.sent(planted)], prepared=prepared, planted=[planted])
        recovery = attack.run(self.knowledge(Observation, seen))
        assert recovery.label_counts.dtype == torch.int64
        sizes = torch.tensor(self.facts.client_sizes)
        assert torch.equal(recovery.label_counts.sum(2), sizes.expand(TRIALS, -1))
        return recovery

    def exact(self, attack):
        """Which clients' counts are right, (T, K)."""
        return (self.run(attack).label_counts == self.counts).all(2)

    def recall(self, attack):
        shared = torch.minimum(self.run(attack).label_counts, self.counts).sum(2)
        return float((shared / torch.tensor(self.facts.client_sizes)).mean())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("clients", [1, 2, 5, WIDTH, WIDTH + 1])
def test_counts_are_exact_up_to_as_many_clients_as_equations(clients, mode):
    assert Scene(clients, protocol={"batch_norm": mode}).exact(BNFishing()).all()


def test_beyond_that_clients_with_channels_of_their_own_stay_exact_and_the_rank_tells():
    scene = Scene(WIDTH + 8, protocol=TRAIN)
    right = scene.exact(BNFishing())
    assert right[:, 8:WIDTH].all()
    assert not right.all(1).any()
    assert torch.equal(scene.run(BNFishing()).notes["rank"], torch.full((TRIALS,), WIDTH + 1.0).double())


def test_without_a_bias_there_is_one_equation_less():
    def drop_bias(net):
        net.fc = nn.Linear(net.fc.in_features, net.fc.out_features, bias=False)
        return net

    assert Scene(WIDTH, transform=drop_bias).exact(BNFishing()).all()
    assert not Scene(WIDTH + 1, transform=drop_bias).exact(BNFishing()).all()


@pytest.mark.parametrize(
    ("net", "layer", "clients", "mode"),
    [
        ("lenet5", "body.0.bn1", 84, "eval"),
        ("lenet5", "body.0.bn1", 20, "train"),
        ("resnet20", "body.1", 10, "eval"),
        ("resnet20", "body.1", 10, "train"),
    ],
)
def test_the_layer_preset_is_one_that_no_path_leads_around(net, layer, clients, mode):
    scene = Scene(clients, net, protocol={"batch_norm": mode}, batch=(4,))
    planted = scene.planted(BNFishing(), scene.prepare(BNFishing())).tensors
    assert planted.keys() == {f"{layer}.weight", f"{layer}.bias"}
    assert not planted[f"{layer}.weight"].any()
    assert scene.exact(BNFishing()).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_embeddings_and_probabilities_of_real_inputs_are_the_prepared_ones(net, mode):
    scene = Scene(3, net, protocol={"batch_norm": mode})
    attack = BNFishing()
    prepared = scene.prepare(attack)
    for k, (inputs, _) in enumerate(scene.victims):
        model = scene.planted(attack, prepared).model_of(k)
        logits, features, _ = model.run(inputs, batch_norm=mode)
        for seen, name in ((features, "embeddings"), (logits.softmax(-1), "probabilities")):
            expected = prepared[name][0, k].float().expand_as(seen)
            torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)


def test_the_last_block_of_a_residual_net_does_not_hide_the_input():
    scene = Scene(4, "resnet20", protocol={"batch_norm": "eval"})
    last = [name for name in scene.model.parameters if name.endswith("bn2.weight")][-1].removesuffix(".weight")
    assert not scene.exact(BNFishing(layer=last, spread=1.0)).all()


@pytest.mark.parametrize("design", ["blocks", "selected"])
@pytest.mark.parametrize(
    "protocol",
    [
        {"weighting": "examples"},
        {"reduction": "sum"},
        {"weighting": "examples", "reduction": "sum"},
        {"sends": "delta", "lr": 0.01},
        {"sends": "weights"},
        {"sends": "delta", "reduction": "sum"},
        {"precision": "float64"},
    ],
)
def test_any_weighting_and_way_of_sending_one_step_is_exact(protocol, design):
    scene = Scene(7, batch=(2, 9, 4), protocol=TRAIN | protocol)
    assert scene.exact(BNFishing(design=design)).all()


@pytest.mark.parametrize(("lr", "exact"), [(0.01, True), (0.5, False)])
def test_over_several_local_steps_exactness_is_lost_as_the_model_moves(lr, exact):
    scene = Scene(7, batch=(16,), protocol={"sends": "delta", "local_steps": 2, "lr": lr, "batches": "fresh"})
    assert bool(scene.exact(BNFishing()).all()) == exact


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_embeddings_of_blocks_do_not_overlap(scale):
    embeddings = Scene(5, protocol=TRAIN).prepare(BNFishing(design="blocks", scale=scale))["embeddings"][0]
    products = embeddings @ embeddings.mT
    torch.testing.assert_close(products, products.diag().diag())


@pytest.mark.parametrize("net", ["mlp", "lenet5"])
def test_dropout_of_the_embedding_ends_exactness(net):
    assert Scene(4, net, batch=(16,)).exact(BNFishing()).all()
    assert not Scene(4, net, batch=(16,), defense=(Dropout(p=0.5),)).exact(BNFishing()).all()


def test_a_small_scale_costs_little_and_a_large_one_much():
    scene = Scene(6, batch=(16,), protocol=TRAIN)
    recalls = [scene.recall(BNFishing(scale=scale)) for scale in (1e-4, 0.1, 1.0)]
    assert recalls[0] == 1
    assert recalls[0] >= recalls[1] > recalls[2]


def test_every_trial_may_have_weights_of_its_own_as_long_as_shifts_do_not_depend_on_them():
    assert Scene(WIDTH, models=TRIALS, protocol=TRAIN).exact(BNFishing()).all()
    with pytest.raises(NotApplicable, match="model_draws: one"):
        Scene(WIDTH, models=TRIALS).prepare(BNFishing(design="selected"))


def test_selected_shifts_are_better_told_apart_than_blocks_where_clients_outnumber_channels():
    scene = Scene(30, "lenet5")
    conditions = {
        d: float(scene.run(BNFishing(design=d)).notes["condition"][0]) for d in ("blocks", "selected", "auto")
    }
    assert conditions["auto"] == conditions["selected"] < conditions["blocks"]


@pytest.mark.parametrize(
    ("scene", "attack", "reason"),
    [
        (Scene(3, params={}), BNFishing(), "no path leads around"),
        (Scene(3), BNFishing(layer="body.bn7"), "no BatchNorm layer 'body.bn7'"),
        (Scene(3, threat=ThreatModel()), BNFishing(), "grant change_parameters"),
    ],
)
def test_what_does_not_fit_is_declined(scene, attack, reason):
    with pytest.raises(NotApplicable, match=reason):
        scene.prepare(attack)


@pytest.mark.parametrize("withheld", ["lr", "local_steps"])
def test_a_change_of_weights_is_declined_where_it_cannot_be_turned_into_a_gradient(withheld):
    threat = SERVER.model_copy(update={withheld: False})
    with pytest.raises(NotGranted, match=withheld):
        Scene(3, threat=threat, protocol={"sends": "delta"}).prepare(BNFishing())
    assert Scene(3, threat=threat).exact(BNFishing()).all()


@pytest.mark.parametrize(
    "arguments", [{"design": "dense"}, {"scale": -1.0}, {"spread": 0.0}, {"pool": 0}], ids=lambda a: next(iter(a))
)
def test_wrong_arguments_are_refused_in_one_line(arguments):
    with pytest.raises(UserError, match=f"bn_fishing: {next(iter(arguments))}: expected"):
        BNFishing(**arguments)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30]), st.integers(0, 3))
def test_any_update_gives_a_valid_claim(size, seed):
    scene = Scene(WIDTH + 3)
    stream = torch.Generator().manual_seed(seed)
    parts = {name: scene.model.parameters[name] for name in ("fc.weight", "fc.bias")}
    noise = {name: size * torch.randn(TRIALS, *v.shape[1:], generator=stream) for name, v in parts.items()}
    notes = scene.run(BNFishing(), noise).notes
    assert all(bool(torch.isfinite(value.float()).all()) for value in notes.values())
