"""Every parameter of every sampler, with values inside, at the edge of and outside of its range, and of wrong types:
one sentence names it, or the result is finite and real."""

import math
import re
from functools import partial

import pytest
import torch

import operators
from benchmarks.posteriors import SHAPE, example_priors
from operators import RestoreError
from restore import samplers
from restore.config import read_yaml
from restore.method import Method
from restore.paths import configs_dir
from restore.samplers.generate import generate

NUMBERS = (-1, -1e-6, 0.0, 0, 1e-6, 0.5, 1.0, 1, 1 + 1e-6, 3, 1e6, 1e-200, 1e200)
STRANGE = (
    math.nan,
    math.inf,
    -math.inf,
    True,
    "abc",
    "0.5",
    "nowhere:f",
    "",
    [0.5],
    (1, 2),
    {"a": 1},
    torch.ones(2),
    None,
)
# Required parameters, and what makes a run short.
OWN = {
    "daps": {"ode_steps": 2, "mcmc_steps": 2},
    "dps": {"zeta": 1.0},
    "flowdps": {"step_size": 1.0},
    "pnpdm": {"iterations": 2},
    "psld": {"eta": 1.0, "gamma": 0.1},
    "resample": {"every": 1, "travel": 1, "pixel_iterations": 2, "latent_iterations": 2},
}
PAIRS = [(name, key) for name in samplers.SAMPLERS for key in samplers.sampler_parameters(name)]


@pytest.fixture(scope="module")
def prior():
    return example_priors()["white Gaussian"]


def draw(k, shape, kind="latent"):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def run(name, prior, own):
    operator = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = operator.A(0.3 * draw(7, (1, *SHAPE)))
    return samplers.find_sampler(name)(prior, operator, y, noise=draw, steps=2, **{**OWN.get(name, {}), **own})


def refusal(function):
    """The sentence by which a call is refused; None if it returns something finite and real."""
    try:
        x = function()
    except RestoreError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return str(error)
    assert x is None or (x.shape == (1, *SHAPE) and x.is_floating_point() and torch.isfinite(x).all())
    return None


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_every_value_gives_a_result_or_one_sentence(prior, name, key):
    sentences = [refusal(partial(run, name, prior, {key: value})) for value in (*NUMBERS, *STRANGE)]
    refused = [sentence for sentence in sentences if sentence is not None]
    assert refused and all(key in sentence for sentence in refused)


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_what_a_method_takes_a_call_takes(name, key):
    """The border refuses what the sampler's own check refuses, in the same words."""
    own = {name: None for name in ("prior", "operator", "y", "noise", "steps")} | OWN.get(name, {})
    for value in (*NUMBERS, *STRANGE):
        if value is not None:
            try:
                Method(name, 3).override(parameters={**OWN.get(name, {}), key: value})
            except RestoreError as error:
                with pytest.raises(RestoreError, match=f"^{re.escape(str(error))}$"):
                    samplers.find_sampler(name)(**own | {key: value})


def test_published_settings_are_in_range():
    for path in (configs_dir() / "method").glob("*.yaml"):
        if path.stem == "defaults":
            continue
        config = read_yaml(path)
        blocks = [config.get("reference") or {}, *config["presets"]]
        for settings in [block.get(key) or {} for block in blocks for key in ("parameters", "unguided")]:
            sampler = generate if config["sampler"] == "generate" else config["sampler"]
            samplers.check_parameters(sampler, settings, complete=False)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("diffpir", {"zeta": 1.5}, r"zeta must be a number in \[0, 1\], got 1.5"),
        ("diffpir", {"lam": 0}, "lam must be a finite number > 0, got 0"),
        ("ddrm", {"eta": 1.0001}, r"eta must be a number in \[0, 1\], got 1.0001"),
        ("daps", {"ode_steps": 0}, "ode_steps must be a whole number >= 1, got 0"),
        ("daps", {"ode_steps": 2.0}, "ode_steps must be a whole number >= 1, got 2.0"),
        ("daps", {"lr": -1e-4}, "lr must be a finite number > 0, got -0.0001"),
        ("daps", {"tau": 0.0}, "tau must be a finite number > 0 or None, got 0.0"),
        ("daps", {"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ("daps", {"conditional": "exat"}, "unknown conditional 'exat'; did you mean 'exact'"),
        ("daps", {"data_norm": "poison"}, "unknown data_norm 'poison'; did you mean 'poisson'"),
        ("daps", {"sigma_min": 20.0, "sigma_max": 10.0}, "sigma_min and ode_sigma_min must be at most sigma_max, 10"),
        ("pnpdm", {"rho_min": 2.0, "rho_max": 1.0}, "rho_min must be at most rho_max"),
        ("dps", {"scale_zeta": 1}, "scale_zeta must be true or false, got 1"),
        ("dps", {"ddim_eta": 2}, r"ddim_eta must be a number in \[0, 1\] or None, got 2"),
        ("reddiff", {"start_from": "noise"}, "unknown start_from 'noise'"),
        (
            "reddiff",
            {"weighting": 3},
            "weighting must be linear, sqrt, square, constant, module:function or a function",
        ),
        ("resample", {"every": 0}, "every must be a whole number >= 1, got 0"),
    ],
)
def test_sentences(prior, name, own, message):
    with pytest.raises(RestoreError, match=message):
        run(name, prior, own)


def test_generation(prior):
    for value in (*NUMBERS, *STRANGE):
        for key in ("ddim_eta", "clip"):
            sentence = refusal(lambda own={key: value}: generate(prior, 1, noise=draw, steps=2, **own))
            assert sentence is None or key in sentence
    for n in (0, -1, 1.5, True, "2"):
        assert "n must be" in refusal(lambda n=n: generate(prior, n, noise=draw, steps=3))


def test_a_users_sampler_is_held_to_its_annotations(prior):
    def own(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, gain: float = 1.0, x=2):
        return y

    assert Method(own, 1).override(parameters={"gain": 2, "x": "anything"}).parameters["gain"] == 2
    for value in ("2", math.nan, None, True):
        with pytest.raises(RestoreError, match="gain must be a finite number, got"):
            Method(own, 1).override(parameters={"gain": value})
