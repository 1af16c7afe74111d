"""What the choices of the authors' PSLD code cost in quality, against the clean ones: prints a table with -s.

The prior is the embedded one with an identity autoencoder, so that PSLD runs on a trained prior without a
download; the images are its own samples, for which the prior is the right one. DDIM runs with its noise (eta = 1):
without, this small prior's errors stay in the image (see its model card) and hide the difference between the
choices. What concerns the encoder's sampling cannot be measured this way.
"""

import pytest
import torch

import operators
import restore
from restore.bench.baselines import baseline
from restore.metrics.single import psnr
from restore.samplers.noise import ImageNoise
from restore.samplers.psld import psld

IMAGES, STEPS, ETA, GAMMA, DDIM_ETA = 4, 100, 5.0, 0.5, 1.0
NOISE = operators.GaussianNoise(0.05)
TASKS = {
    "SR x4": lambda adjoint: operators.SuperResolution(4, noise=NOISE, adjoint=adjoint),
    "Gaussian blur": lambda adjoint: operators.GaussianBlur(15, 1.5, noise=NOISE, adjoint=adjoint),
}
CHOICES = {
    "clean": ("exact", {}),
    "noise on the prediction": ("exact", {"measurement_noise": True}),
    "the authors' transposes": ("reference", {}),
    "both": ("reference", {"measurement_noise": True}),
}


@pytest.mark.slow
def test_clean_choices_against_the_authors():
    restorer = restore.load("embedded", precision="auto")
    x = restorer.generate(IMAGES, steps=100, batch_size=IMAGES)
    prior = restorer.prior(*x.shape[-2:])  # in pixels the autoencoder is the identity
    keys = [(0, str(i), 0) for i in range(IMAGES)]
    print(f"\nPSNR in dB, {IMAGES} samples of the prior, {STEPS} steps, eta {ETA}, gamma {GAMMA}, DDIM eta {DDIM_ETA}")
    for task, make in TASKS.items():
        y = make("exact")(x, [torch.Generator().manual_seed(i) for i in range(IMAGES)])
        simple = float(psnr(baseline(y, make("exact")), x).mean())
        found = {}
        for name, (adjoint, options) in CHOICES.items():
            options = {"steps": STEPS, "eta": ETA, "gamma": GAMMA, "ddim_eta": DDIM_ETA, **options}
            result = psld(prior, make(adjoint), y, noise=ImageNoise(keys), **options).clamp(-1, 1)
            found[name] = float(psnr(result, x).mean())
        print(f"{task}: baseline {simple:.2f}, " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
        assert min(found.values()) > simple
        assert found["clean"] > max(found.values()) - 0.5
