"""Combining strong and weak predictions: eq. 14 against explicit passes, schedules, gradients, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import restore.guidance as guidance_package
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.backbones.memory_options import enable_block_checkpointing
from restore.guidance import CFG, PAG, estimator
from restore.guidance.attention import PerturbedLayer, perturb_attention
from restore.guidance.targets import identity

GOLDEN = Path(__file__).parent.parent / "golden"


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


@pytest.fixture(scope="module")
def model():
    """Class-conditional; class 0 plays the null class."""
    return ADM.load(GOLDEN / "nets/adm_b.safetensors", head_channels=16, null_class=0)


@pytest.fixture(scope="module")
def plain():
    return ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "pag_eps.safetensors")


def perturbed_eps(model, x, t, y, *shorts, strength=1.0):
    items = [PerturbedLayer(layer, identity, strength) for layer in model.attention.values() if layer.short in shorts]
    assert len(items) == len(shorts)
    with torch.no_grad(), perturb_attention(items, None):
        return model.predict(x, t, y).eps


@pytest.fixture
def passes(model, monkeypatch):
    """Counts the network's evaluations."""
    counted, predict = [], model.predict

    def counting(x_t, t, condition=None):
        counted.append(torch.is_grad_enabled() and x_t.requires_grad)
        return predict(x_t, t, condition)

    monkeypatch.setattr(model, "predict", counting)
    return counted


@pytest.mark.parametrize("g", [1.0, 2.0, 4.0])
def test_official_guided_eps(model, golden, g):
    """guide_scale of the PAG repository is s + 1."""
    layers = "input_blocks.7.1,middle_block.1"
    with torch.no_grad(), estimator(model, PAG(g - 1, layers)) as estimate:
        _, eps = estimate(golden["x_t"], golden["t"], golden["y"])
    assert relative(eps, golden[f"guided_eps.g{g}"]) < 1e-5


@pytest.mark.parametrize("share_prefix", [True, False])
def test_cfg_and_pag_together_are_equation_14(model, golden, share_prefix):
    x, y, t = golden["x_t"], golden["y"], 321
    with torch.no_grad():
        strong = model.predict(x, t, y).eps
        null = model.predict(x, t, torch.tensor([0, 0])).eps
    weak = perturbed_eps(model, x, t, y, "i7", "m1")
    expected = strong + 1.5 * (strong - null) + 2.0 * (strong - weak)
    with estimator(model, CFG(1.5) + PAG(2.0, "i7,m1"), share_prefix=share_prefix) as estimate:
        for _ in range(2):
            prediction, eps = estimate(x, t, y)
            assert torch.equal(prediction.eps, strong)
            assert relative(eps, expected) < 1e-6
        assert estimate.evaluations == 6


def test_several_weak_branches_share_one_strong_pass(model, golden, passes):
    x, y, t = golden["x_t"], golden["y"], 321
    guidance = PAG(1.0, "i7") + PAG(-0.5, "o2", strength=0.4) + PAG(0.7, "m1", target="uniform")
    with estimator(model, guidance, share_prefix=False) as estimate:
        expected = estimate(x, t, y)[1]
    passes.clear()
    with estimator(model, guidance) as estimate:
        got = [estimate(x, t, y)[1] for _ in range(3)]
        assert all(tape.queues for tape in estimate.tapes)
    assert len(passes) == 12
    assert all(torch.equal(eps, expected) for eps in got)
    strong = model.predict(x, t, y).eps
    direct = strong + (strong - perturbed_eps(model, x, t, y, "i7"))
    direct = direct - 0.5 * (strong - perturbed_eps(model, x, t, y, "o2", strength=0.4))
    uniform = PAG(0.7, "m1", target="uniform").bind(model).eps(x, t, y, None)
    assert relative(got[0], direct + 0.7 * (strong - uniform)) < 1e-6


@pytest.mark.parametrize("guidance", [None, PAG(0, "m1"), CFG(0.0) + PAG(0.0, "m1"), PAG(1.0, "m1", interval=(9, 0))])
def test_off_means_no_weak_pass(model, golden, passes, guidance):
    with estimator(model, guidance) as estimate:
        strong, eps = estimate(golden["x_t"], 10, golden["y"])
    assert len(passes) == 1 and estimate.evaluations == 1
    assert torch.equal(eps, strong.eps) and not eps.requires_grad


def test_intervals_include_both_ends(model, golden, passes):
    guidance = PAG(1.0, "m1", interval=(700, 300)) + CFG(1.0, interval=(500, 0))
    counts = {}
    with estimator(model, guidance) as estimate:
        for t in (701, 700, 501, 500, 300, 299, 0):
            before = len(passes)
            estimate(golden["x_t"], t, golden["y"])
            counts[t] = len(passes) - before
    assert counts == {701: 1, 700: 2, 501: 2, 500: 3, 300: 3, 299: 2, 0: 2}


def test_cfg_without_anything_to_contrast_runs_no_weak_pass(model, golden, passes):
    with estimator(model, CFG(2.0)) as estimate:
        strong, eps = estimate(golden["x_t"], 10)
        assert len(passes) == 1 and torch.equal(eps, strong.eps)
    with estimator(model, CFG(2.0, null=torch.tensor([7]))) as estimate:
        strong, eps = estimate(golden["x_t"], 10)
        weak = model.predict(golden["x_t"], 10, 7).eps
        assert relative(eps, strong.eps + 2.0 * (strong.eps - weak)) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_flows_only_through_the_strong_pass(golden, checkpointing, plain):
    """The checkpoint trap: blocks recomputed in backward must see neither perturbed attention nor replay."""
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    if checkpointing:
        enable_block_checkpointing(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    alone = x.clone().requires_grad_()
    expected = torch.autograd.grad(plain.predict(alone, 400).eps.square().sum(), alone)[0]
    with estimator(model, PAG(2.0, "i7,m1") + PAG(1.0, "o2", target="noise")) as estimate:
        for _ in range(2):
            x_t = x.clone().requires_grad_()
            strong, eps = estimate(x_t, 400)
            assert strong.eps.requires_grad and not eps.requires_grad
            gradient = torch.autograd.grad(strong.eps.square().sum(), x_t)[0]
            assert torch.equal(gradient, expected)
            assert not any(queue for tape in estimate.tapes for queue in tape.queues.values())


def test_the_trap_would_be_noticed(plain):
    """With the perturbation still there when a checkpointed pass is computed again, the gradient is another one."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def loss(x):
        return plain.predict(x, 400).eps.square().sum()

    right = torch.autograd.grad(loss(x), x)[0]
    again = checkpoint(loss, x, use_reentrant=False)
    with perturb_attention([PerturbedLayer(layer, identity) for layer in plain.attention.values()], None):
        try:
            wrong = torch.autograd.grad(again, x)[0]
        except torch.utils.checkpoint.CheckpointError:  # newer PyTorch compares what was saved
            return
    assert relative(wrong, right) > 1e-3


def test_prefix_is_shared_from_the_second_call_on(model, golden):
    """Convolutions of the weak pass: those behind the middle block, whichever term is active first."""
    network = model.network
    count = {"all": 0, "down": 0}

    def counting(module, args, output, where):
        count[where] += 1

    handles = [network.conv_out.register_forward_hook(lambda *a: counting(*a, "all"))]
    inner = network.down_blocks[0].resnets[0].conv1
    handles.append(inner.register_forward_hook(lambda *a: counting(*a, "down")))
    with estimator(model, PAG(1.0, "m1") + PAG(1.0, "o2", interval=(100, 0))) as estimate:
        for t in (500, 50, 40):
            estimate(golden["x_t"], t, golden["y"])
    for handle in handles:
        handle.remove()
    assert count == {"all": 2 + 3 + 3, "down": 2 + 1 + 1}


def test_weak_passes_run_without_gradient(model, golden, passes):
    with estimator(model, CFG(1.0) + PAG(1.0, "m1")) as estimate:
        estimate(golden["x_t"].clone().requires_grad_(), 10, golden["y"])
    assert passes == [True, False, False]


def test_an_exception_in_the_loop_leaves_the_network_as_it_was(model, golden):
    def state():
        modules = list(model.network.modules())
        return [(m.__dict__.get("forward"), len(m._forward_hooks), getattr(m, "processor", None)) for m in modules]

    before = state()
    with pytest.raises(KeyError), estimator(model, PAG(1.0, "i7")) as estimate:
        estimate(golden["x_t"], 10, golden["y"])
        raise KeyError
    assert state() == before

    def fails(record):
        raise KeyError

    with pytest.raises(KeyError), estimator(model, PAG(1.0, "i7", target=fails)) as estimate:
        estimate(golden["x_t"], 10, golden["y"])
    assert state() == before and not any(q for tape in estimate.tapes for q in tape.queues.values())


def test_chosen_heads(model, golden):
    """All heads by number equal all heads; a mapping chooses per layer; the rest stay true."""
    x, y, t = golden["x_t"], golden["y"], 250

    def weak(**options):
        with torch.no_grad():
            return PAG(1.0, "i7,m1", **options).bind(model).eps(x, t, y, None)

    assert relative(weak(heads=[0, 1]), weak()) < 1e-6
    assert torch.equal(weak(heads={"i7": [1], "middle_block.1": [1]}), weak(heads=1))
    assert relative(weak(heads={"i7": [0]}), weak(heads={"i7": [0], "m1": [0, 1]})) < 1e-6
    assert relative(weak(heads=[0]), weak(heads=[1])) > 1e-3


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: PAG(1.0, "i99"), "no attention layer is called 'i99'"),
        (lambda: PAG(1.0, "m1", heads=[2]), r"must be in 0\.\.1, got \[2\]"),
        (lambda: PAG(1.0, "m1", heads=[]), r"got \[\]"),
        (lambda: PAG(1.0, "m1", heads={"i7": [0]}), "not among the perturbed layers"),
        (lambda: PAG(1.0, "m1", target="ident"), "unknown target of pag 'ident'; did you mean 'identity'"),
        (lambda: PAG(float("nan"), "m1"), "finite"),
        (lambda: PAG(1.0, "m1", strength=1.5), r"\[0, 1\]"),
        (lambda: PAG(1.0, "m1", interval=(100, 200)), "t_high >= t_low"),
        (lambda: CFG(1.0, interval=(1,)), r"interval of cfg must be .*, got \(1,\)"),
    ],
)
def test_bad_guidance(model, make, match):
    with pytest.raises(RestoreError, match=match), estimator(model, make()):
        pass


def test_cfg_without_null_condition_is_an_error(plain):
    with pytest.raises(RestoreError, match="needs a null condition"), estimator(plain, CFG(1.0)):
        pass


def test_sums():
    total = CFG(1.0) + PAG(2.0, "m1") + PAG(3.0, "i7")
    assert [term.scale for term in total.terms] == [1.0, 2.0, 3.0]
    assert [term.scale for term in (PAG(1.0, "m1") + (CFG(2.0) + CFG(3.0))).terms] == [1.0, 2.0, 3.0]
    with pytest.raises(TypeError):
        CFG(1.0) + 2
    assert isinstance(total, guidance_package.Guidance)


def test_a_weak_pass_is_used_again(model, golden, passes):
    """every=2: the first and third are computed, the others take the difference before; not one of another size."""
    x, y = golden["x_t"], golden["y"]
    times = (500, 480, 460, 440)
    found = {}
    for every in (1, 2):
        passes.clear()
        with estimator(model, PAG(2.0, "m1", every=every)) as estimate:
            found[every] = [estimate(x, t, y) for t in times]
            assert len(passes) == estimate.evaluations == {1: 8, 2: 6}[every]
            assert not any(queue for tape in estimate.tapes for queue in tape.queues.values())
            estimate(x[:1], 420, y[:1])
    (now, again) = ([eps - strong.eps for strong, eps in found[every]] for every in (1, 2))
    for k in range(4):
        assert relative(again[k], now[k - k % 2]) < 1e-4
    assert relative(again[1], now[1]) > 1e-3
    with pytest.raises(RestoreError, match="every"):
        PAG(2.0, "m1", every=0)
