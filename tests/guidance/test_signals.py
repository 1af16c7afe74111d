"""|eps − eps_weak| of every step: in the callback of every sampler, and as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import operators
import restore
from restore import samplers
from restore.app.trajectory import Trajectory
from restore.backbones.adm import ADM
from restore.guidance import CFG, PAG, SAG, TSG, Guidance, describe_guidance
from restore.restorer import Restorer, load


@pytest.fixture(scope="module")
def restorer(tiny_adm):
    return Restorer(ADM.load(tiny_adm))


@pytest.fixture(scope="module")
def noted():
    """What reaches the combination: (eps, weak predictions) of each guided step."""
    return []


@pytest.fixture(scope="module")
def guidance(noted):
    def combine(eps, weak):
        noted.append((eps, [eps_weak for _, eps_weak in weak]))
        return restore.guidance.combine.weighted_sum(eps, weak)

    return Guidance((PAG(1.0, "m1"), TSG(0.5, interval=(600, 0)), PAG(0.0, "m1")), combine)


def expected_signals(eps, weak):
    first = (eps - weak[0]).abs().mean(1, keepdim=True)
    return [first, (eps - weak[1]).abs().mean(1, keepdim=True) if len(weak) > 1 else None, None]


def same(signals, expected):
    return len(signals) == len(expected) and all(
        a is b is None or torch.equal(a, b) for a, b in zip(signals, expected, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_callback_gets_them(restorer, guidance, noted, batch_size):
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    options = {"sampler": "dps", "steps": 4, "zeta": 0.3, "batch_size": batch_size}
    steps, options = [], {**options, "guidance": guidance}
    noted.clear()
    result = restorer(y, operator, callback=steps.append, **options)
    seen = list(noted)
    assert len(steps) == len(seen) == 4 * 2 // batch_size
    for step, (eps, weak) in zip(steps, seen, strict=True):
        assert same(step["signals"], expected_signals(eps, weak))
        assert step["signals"][0].shape == (batch_size, 1, 16, 16)
        assert (step["signals"][1] is None) == (step["t"] > 600)
    assert {step["t"] > 600 for step in steps} == {True, False}
    plain = restorer(y, operator, **options)
    assert torch.equal(plain.samples, result.samples) and plain.nfe == result.nfe

    steps.clear()
    noted.clear()
    restorer.generate(1, guidance=guidance, steps=3, callback=steps.append)
    assert all(same(step["signals"], expected_signals(*note)) for step, note in zip(steps, noted, strict=True))
    steps.clear()
    restorer.generate(1, steps=2, callback=steps.append)
    assert all("signals" not in step for step in steps)
    restorer.generate(1, guidance=guidance, steps=1, callback=steps.append)
    assert "predictions" not in steps[-1]  # as large as x_t, and only for who wants them


@pytest.mark.parametrize("sampler", ["dps", "diffpir"])
def test_a_callback_changes_neither_result_nor_cost(restorer, sampler):
    """Of guidance with every option that terms have, reused weak passes among them."""
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    guidance = PAG(1.0, "m1", every=3, schedule="linear") + TSG(0.5, interval=(600, 0), every=2)
    options = {"sampler": sampler, "steps": 8, "guidance": Guidance(guidance.terms, "zero_star")}
    plain = restorer(y, operator, **options)
    steps = Steps()
    seen = restorer(y, operator, callback=steps, **options)
    assert torch.equal(plain.samples, seen.samples) and plain.nfe == seen.nfe
    ran = [sum(signal is not None for signal in step["signals"]) for step in steps]
    assert plain.nfe == 8 + sum(ran) and 0 < sum(ran) < 8


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_every_sampler_can_be_pictured(restorer, name):
    """A row for each term that was on, a column for each step, on paper that is white between them."""
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.zeros(1, 3, 16, 16))
    trajectory, guidance = Trajectory(), PAG(1.0, "m1") + TSG(0.5) + PAG(1.0, "m1", interval=(-1, -1))
    try:
        few = {"iterations": 2} if name == "pnpdm" else {}
        restorer(y, operator, sampler=name, steps=3, guidance=guidance, callback=trajectory, **few)
    except restore.RestoreError as error:
        assert "latent" in str(error) or "decoded" in str(error), error
        return
    assert trajectory.guided
    picture = trajectory.guidance(describe_guidance(guidance))
    columns = len(trajectory.times)
    height = picture.height / 2
    assert picture.width > columns * 128 and 128 < height < 256
    assert trajectory.estimates(describe_guidance(guidance)).width > columns * 128
    for signals in trajectory.signals:
        assert signals[0].shape == (16, 16) and signals[2] is None


def test_the_picture_shows_the_signal():
    """Each row from black, 0, to white, the value that 99 % of its pixels are below (outliers clipped, App. A.1)."""
    trajectory = Trajectory()
    for k, largest in enumerate((0.9, 2.0)):
        signal = torch.linspace(0, largest, 64).view(1, 1, 8, 8)
        step = {"step": k, "steps": 2, "t": 10 - k, "first": 0, "x0_hat": torch.zeros(1, 3, 8, 8)}
        trajectory({**step, "signals": [signal, None if k == 0 else 10 * signal]})
    picture = trajectory.guidance(describe_guidance(PAG(2.0, ["i5", "m1"]) + TSG(1.0)))
    greys = np.asarray(picture.convert("L")).astype(int)
    assert picture.width > 2 * 128 and picture.height > 2 * 128
    # Each of a cell's 64 values fills 16 x 16 pixels: the first step reaches 0.9, and no other value is as grey; three
    # cells begin with 0, and the fourth is empty.
    white = np.quantile(np.r_[np.linspace(0, 0.9, 64), np.linspace(0, 2, 64)], 0.99)
    assert white < 1.98
    assert int((greys == round(255 * 0.9 / white)).sum()) in range(256, 300)
    assert 3 * 256 <= int((greys == 0).sum()) < 4 * 256


class Steps(list):
    predictions = True
    __call__ = list.append


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", ["pag", "cfg", "sag"])
def test_predictions_are_those_of_the_step(name, latent, stand_ins):
    """Clean estimates are linear in eps: guided = strong + s (strong - weak). The strong one is the network's own."""
    model = load(stand_ins["sd-1.5"] if latent else "embedded", device="cpu")
    for module in model.backbone.network.modules():  # random weights attend to nothing in particular
        if latent and hasattr(module, "to_out"):
            module.to_q.weight *= 30
            module.to_out[0].weight *= 30
    s = 1.5
    terms = {"pag": PAG(s, "m1"), "cfg": CFG(s), "sag": SAG(s, "m1", sigma=1.0, taps=5)}
    given = {"prompt": "a cat"} if latent else {"labels": ["face"]}
    steps = Steps()
    model.generate(1, guidance=terms[name], steps="ddim3", ddim_eta=0.0, callback=steps, **given)
    assert len(steps) == 3
    for step in steps:
        strong, guided, (weak,) = (step["predictions"][key] for key in ("strong", "guided", "weak"))
        assert (strong - weak).abs().max() > 1e-4
        expected = strong + s * (strong - weak)
        assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()
        assert step["decode"](guided).shape == (1, 3, *[model.backbone.resolution * model.backbone.downscale] * 2)
    condition = model.backbone.encode_prompt("a cat") if latent else torch.tensor([model.backbone.labels.index("face")])
    with torch.no_grad():  # at the x_t that the first step left
        own = model.backbone.predict(steps[0]["x_t"], steps[1]["t"], condition).x0
    assert (own - steps[1]["predictions"]["strong"]).abs().max() < 1e-4 * own.abs().max()


def test_rows_of_a_trajectory_are_the_predictions():
    """Guided, strong and weak estimates and |delta|; what the sampler reports is drawn once if it is the same."""
    trajectory, levels = Trajectory(index=1, initial=2), {"guided": 0.6, "strong": 0.2}
    flat = lambda value: torch.full((2, 3, 8, 8), value)  # noqa: E731
    for k in range(3):
        step = {"step": k, "steps": 3, "t": 3 - k, "first": 0, "count": 2, "x0_hat": flat(0.6), "x_t": flat(0.0)}
        predictions = {key: flat(value) for key, value in levels.items()} | {"weak": [flat(-0.2)]}
        step |= {"predictions": predictions, "signals": [torch.ones(2, 1, 8, 8)], "decode": lambda x: x}
        trajectory(step)
    assert trajectory.times == [3, 2]
    greys = np.asarray(trajectory.estimates(describe_guidance(PAG(1.0, "m1"))).convert("L")).astype(int)
    for value in (0.6, 0.2, -0.2):  # two cells of 128 x 128 pixels each, the sampler's own not apart from the guided
        grey = round((value + 1) * 127.5)
        assert int((abs(greys - grey) <= 1).sum()) in range(2 * 128**2, 2 * 128**2 + 300), value
    assert len(trajectory.rows) == 4
