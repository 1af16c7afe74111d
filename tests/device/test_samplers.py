"""Every sampler computes on the pretended accelerator what it computes on the CPU, to the bit."""

from __future__ import annotations

from itertools import product

import pytest
import sim_device
import torch
from sim_device import SimTensor
from sim_priors import (
    ANY_OPERATOR,
    LINEAR,
    NOISE,
    OPERATORS,
    PAG,
    PIXELS,
    SIDE,
    WITH_SVD,
    assert_same,
    image,
    measure,
    pixel_prior,
)

import operators
import restore
from restore.guidance import APG, FDG, SCHEDULES, SLG, SSG, TAG, TARGETS, TSR, Autoguidance, Guidance, Rescale, ZeroStar


@pytest.fixture(scope="module")
def here():
    return pixel_prior()


@pytest.fixture(scope="module")
def there(sim_registered):
    with sim_device.watch():
        return pixel_prior("sim")


def run(here, there, sampler: str, operator, *, y=None, **options):
    """Results of both, of two images in one batch."""
    options = {"steps": 3, "guidance": PAG, "label": 1, "batch_size": 2, **PIXELS[sampler], **options}
    made = OPERATORS[operator]() if isinstance(operator, str) else operator
    if sampler == "reddiff" and not operators.is_linear(made):
        options["start_from"] = "zero"
    y = measure(made) if y is None else y
    return [restorer(y, made, sampler=sampler, **options) for restorer in (here, there)]


def applies(sampler: str, operator: str) -> bool:
    kinds = WITH_SVD if sampler in ("ddrm", "ddnm") else OPERATORS if sampler in ANY_OPERATOR else LINEAR
    return operator in kinds


PAIRS = [pair for pair in product(PIXELS, OPERATORS) if applies(*pair)]
# Every sampler and every operator, the operators with a path of their own in samplers that take it.
FEW = [
    ("diffpir", "denoising"), ("ddrm", "mask"), ("ddnm", "masks"), ("dps", "masks"), ("pnpdm", "bicubic"),
    ("ddrm", "average"), ("ddnm", "gaussian"), ("ddrm", "gaussian-circular"), ("dpir", "motion"),
    ("diffpir", "kernels"), ("ddnm", "kernels-circular"), ("dpir", "motion-unknown"), ("ddrm", "grey"),
    ("pigdm", "blur-and-smaller"), ("diffpir", "motion-and-smaller"), ("diffpir", "jpeg"), ("daps", "own"),
    ("reddiff", "bare"), ("dps", "poisson"), ("daps", "clipping"), ("fastdips", "phase"), ("reddiff", "phase"),
]  # fmt: skip


def test_the_few_name_every_sampler_and_operator():
    samplers, kinds = zip(*FEW, strict=True)
    assert set(samplers) == set(PIXELS) and set(kinds) == set(OPERATORS) and set(FEW) <= set(PAIRS)


@pytest.mark.parametrize(
    ("sampler", "operator"), [pytest.param(*p, marks=() if p in FEW else pytest.mark.slow) for p in PAIRS]
)
def test_operators(sim, here, there, sampler, operator):
    assert_same(*run(here, there, sampler, operator))


TERMS = {
    "none": lambda: None,
    "softpag": lambda: restore.PAG(1.0, "m1", strength=0.5),
    "heads": lambda: restore.PAG(1.0, "m1:0"),
    "cfg": lambda: restore.CFG(1.0),
    "sag": lambda: restore.SAG(0.5),
    "tpg": lambda: restore.TPG(0.5, "m1"),
    "tsg": lambda: restore.TSG(0.5),
    "slg": lambda: SLG(0.5, "m1"),
    "ssg": lambda: SSG(0.5, "m1", share=0.1, axis="both"),
    "swg": lambda: restore.SWG(0.5, window=8),
    "tag": lambda: TAG(0.15),
    "tsr": lambda: TSR(1.0),
    "sum": lambda: PAG + restore.CFG(0.5) + TAG(0.1),
    "apg": lambda: Guidance((PAG, restore.CFG(0.5)), APG(threshold=2.5)),
    "rescale": lambda: Guidance((PAG,), Rescale()),
    "zero_star": lambda: Guidance((PAG,), ZeroStar()),
    "tcfg": lambda: Guidance((restore.CFG(1.0),), "tcfg"),
    "fdg": lambda: Guidance((PAG,), FDG()),
    "interval": lambda: restore.PAG(1.0, "m1", interval=(800, 300)),
    "random": lambda: restore.PAG(1.0, ["i3", "m1"], random_layers=1),
    **{f"schedule-{name}": lambda name=name: restore.PAG(1.0, "m1", schedule=name) for name in SCHEDULES},
    **{f"target-{name}": lambda name=name: restore.PAG(1.0, "m1", target=name) for name in TARGETS},
}
RARE = ("random", "interval", "schedule-", "target-", "heads", "rescale")


@pytest.mark.parametrize(
    "guidance", [pytest.param(name, marks=pytest.mark.slow if name.startswith(RARE) else ()) for name in TERMS]
)
def test_guidance(sim, here, there, guidance):
    """Of the estimate, in a sampler without a gradient; with one the weak passes are the same."""
    assert_same(*run(here, there, "ddnm", "mask", guidance=TERMS[guidance]()))


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "guidance"), list(product(("dps", "pigdm"), TERMS)))
def test_guidance_beside_a_gradient(sim, here, there, sampler, guidance):
    assert_same(*run(here, there, sampler, "mask", guidance=TERMS[guidance]()))


def test_autoguidance(sim, here, there):
    runs = []
    for restorer, device in ((here, "cpu"), (there, "sim")):
        guidance = Autoguidance(1.0, pixel_prior(device, seed=7).backbone)
        runs.append(run(restorer, restorer, "ddnm", "mask", guidance=guidance)[0])
    assert_same(*runs)


@pytest.mark.parametrize("sampler", ["dps", "dpir", "diffpir"])
def test_windows(sim, sampler):
    """Beyond the trained size, with a gradient through the windows and without; SAG joins its masks of all windows."""
    operator, y = operators.Inpainting((image(1, 24)[:, :1] > 0).float(), noise=NOISE), None
    y = operator(image(1, 24), torch.Generator().manual_seed(0))
    own = {"guidance": None, "region": 1 - operator.mask} if sampler == "diffpir" else {"guidance": restore.SAG(0.5)}
    options = {"batch_size": 1, "steps": 2, "y": y} | own
    runs = [pixel_prior(device, max_windows=2) for device in ("cpu", "sim")]
    assert_same(*run(*runs, sampler, operator, **options))
    assert sum(n for place, n in sim.places["uploads"].items() if "sizes.py" in place) <= 2  # weights, once


@pytest.mark.parametrize("operator", ["masks", "kernels"])
def test_samples_in_batches_of_another_size(sim, here, there, operator):
    """The rows of per-image masks and kernels are chosen for every batch."""
    assert_same(*run(here, there, "diffpir", operator, samples=3, batch_size=4, steps=2))


@pytest.mark.parametrize("start", ["measurement", "dagger", "adjoint", "zero", "fill"])
def test_starts(sim, here, there, start):
    assert_same(*run(here, there, "diffpir", "masks", start_from=start, steps=1))


@pytest.mark.parametrize("options", [{"ddim_eta": None}, {"ddim_eta": 0.5, "guidance": PAG}])
def test_generation(sim, here, there, options):
    x, x_sim = (r.generate(2, steps=3, labels=[1, 2], batch_size=2, **options) for r in (here, there))
    assert isinstance(x_sim, SimTensor) and torch.equal(x, x_sim.held)


def test_what_is_left_behind_is_refused(sim, there):
    """The device is as strict as it should be: an operator with a mask of the host fails."""

    class Forgetful(operators.Operator):
        name = "forgetful"

        def A(self, x):
            return x * torch.ones(1, 1, SIDE, SIDE)

    with pytest.raises(RuntimeError, match="on the same device"):
        there(torch.zeros(1, 3, SIDE, SIDE), Forgetful(noise=NOISE), sampler="dps", zeta=1.0, steps=1)
