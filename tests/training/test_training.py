"""The training loop: exact resumption, what it writes, what it refuses."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import restore
from operators import RestoreError
from restore.backbones.schedule import Schedule
from restore.paths import configs_dir
from restore.training import load_training_config, train
from restore.training.dataset import augment, batch_indices, split_files
from restore.training.diffusion import build_unet, hybrid_loss, weigh_levels

TINY = [
    "model.block_out_channels=[32,32]",
    "model.down_block_types=[ResnetDownsampleBlock2D,AttnDownBlock2D]",
    "model.up_block_types=[AttnUpBlock2D,ResnetUpsampleBlock2D]",
    "model.sample_size=16",
    "data.stored_size=32",
    "data.held_out_every=4",
    "batch=4",
    "precision=fp32",
    "log_every=1",
    "held_out_every_steps=4",
    "samples_every_steps=4",
    "checkpoint_every_steps=2",
    "optimizer.warmup_steps=2",
]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def config(faces, out, *settings):
    base = [f"data.folder={faces}", f"out={out}", *TINY]
    return load_training_config(configs_dir() / "train" / "embedded.yaml", [*base, *settings])


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_training_is_not_resumed_with_another_batch_size(faces, tmp_path):
    train(config(faces, tmp_path, "steps=1"))
    with pytest.raises(RestoreError, match="batch must give 4 images a step"):
        train(config(faces, tmp_path, "steps=2", "batch=2"))


def test_interrupted_training_equals_undisturbed_training(faces, tmp_path):
    whole = weights(train(config(faces, tmp_path / "whole", "steps=4")))
    train(config(faces, tmp_path / "parts", "steps=2"))
    parts = weights(train(config(faces, tmp_path / "parts", "steps=4")))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    early = weights(train(config(faces, tmp_path / "early", "steps=2")))
    assert any(not torch.equal(whole[name], early[name]) for name in whole)

    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["eps_loss"]) for row in rows)
    held_out = json.loads((tmp_path / "whole" / "held_out.jsonl").read_text())
    assert held_out["step"] == 4 and all(value > 0 for value in held_out["eps_mse"].values())
    assert min(Image.open(tmp_path / "whole" / "samples" / "0000004.png").size) >= 64

    # The result is a backbone, and training can start from it.
    restorer = restore.load(tmp_path / "whole" / "ema")
    assert restorer.backbone.resolution == 16 and restorer.backbone.learned_variance
    further = weights(train(config(faces, tmp_path / "further", "steps=1", f"init={tmp_path / 'whole' / 'ema'}")))
    assert max(float((further[name] - whole[name]).abs().max()) for name in whole) < 0.01
    # `model` describes the network, also where its weights come from elsewhere.
    regrouped = config(faces, tmp_path / "regrouped", f"init={tmp_path / 'whole' / 'ema'}", "model.norm_num_groups=4")
    network = build_unet(regrouped)
    assert network.conv_norm_out.num_groups == 4
    assert torch.equal(network.conv_in.weight, whole["conv_in.weight"].float())


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(faces, tmp_path):
    train(config(faces, tmp_path, "steps=1"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    # The first step makes large weights, the second ones that are not finite, before anything is logged.
    diverging = [*TINY, "steps=9", "optimizer.lr=1e30", "log_every=100", "checkpoint_every_steps=3"]
    with pytest.raises(RestoreError, match="(loss is|weights are) not finite at step 3; lower optimizer.lr"):
        train(config(faces, tmp_path, *diverging))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    train(config(faces, tmp_path, "steps=2"))


def test_weights_that_are_not_finite_are_not_saved(faces, tmp_path, monkeypatch):
    """Where the loss was finite still: the update that followed it was not."""
    step = torch.optim.AdamW.step

    def diverge(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    with pytest.raises(RestoreError, match="the weights are not finite at step 1; lower optimizer.lr"):
        train(config(faces, tmp_path, "steps=1"))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_refusals(faces, tmp_path):
    yaml = configs_dir() / "train" / "embedded.yaml"
    with pytest.raises(restore.RestoreError, match="data.folder"):
        load_training_config(yaml, [])
    with pytest.raises(restore.RestoreError, match="did you mean 'batch'"):
        load_training_config(yaml, ["batsch=3", "data.folder=x"])
    assert load_training_config("embedded", ["data.folder=x", "prediction_type=sample"]).prediction_type == "sample"
    with pytest.raises(restore.RestoreError, match="none.yaml does not exist"):
        load_training_config(tmp_path / "none.yaml", [])
    with pytest.raises(restore.RestoreError, match="nowhere does not exist"):
        train(config(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(restore.RestoreError, match="must have images, but there are none"):
        train(config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(restore.RestoreError, match="init must be a folder with config.json"):
        train(config(faces, tmp_path / "out", f"init={tmp_path}"))
    train(config(faces, tmp_path / "run", "steps=1"))
    with pytest.raises(restore.RestoreError, match="another model configuration"):
        train(config(faces, tmp_path / "run", "steps=2", "model.attention_head_dim=16"))
    wider = config(faces, tmp_path / "wide", f"init={tmp_path / 'run' / 'ema'}", "model.layers_per_block=2", "steps=1")
    with pytest.raises(restore.RestoreError, match="must have the shapes"):
        train(wider)


def test_batches_visit_every_image_once_an_epoch():
    seen = torch.cat([batch_indices(10, 4, step, seed=1) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    training, held_out = split_files([str(i) for i in range(41)], 20)
    assert held_out == ["0", "20", "40"] and len(training) == 38 and not set(training) & set(held_out)


def test_augmentation_is_small_bounded_and_seeded():
    options = OmegaConf.load(configs_dir() / "train" / "embedded.yaml").data.augment
    ramp = torch.linspace(0, 255, 32).expand(4, 3, 32, 32).byte()
    a = augment(ramp, 16, torch.Generator().manual_seed(3), options)
    assert a.shape == (4, 3, 16, 16) and a.abs().max() <= 1
    assert torch.equal(a, augment(ramp, 16, torch.Generator().manual_seed(3), options))
    assert not torch.equal(a, augment(ramp, 16, torch.Generator().manual_seed(4), options))
    none = OmegaConf.create(dict.fromkeys(options, 0.0))
    plain = augment(ramp, 16, torch.Generator().manual_seed(3), none)
    reduced = torch.nn.functional.interpolate(ramp.float() / 127.5 - 1, size=(16, 16), mode="area")
    for image, truth in zip(plain, reduced, strict=True):
        assert min(float((image - truth).abs().max()), float((image - truth.flip(-1)).abs().max())) < 1e-5


def test_loss_against_its_definition():
    """The variational term equals a KL divergence computed by torch.distributions."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(alpha_bar, Schedule.from_config({}).alphas_cumprod)
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, 4, 4, generator=g) * 1.6 - 0.8
    eps, eps_hat, v = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(3))
    t = torch.tensor([300, 700])
    config = OmegaConf.create({"denoising": None, "snr_gamma": 5.0, "high_noise_weight": 8.0})
    simple, vlb = hybrid_loss(eps_hat, v.tanh(), x0, eps, t, alpha_bar, weigh_levels(alpha_bar, config))
    snr = (alpha_bar / (1 - alpha_bar))[t]
    assert 1 / snr[0] < 8 < 1 / snr[1]
    weight = torch.minimum(snr, torch.tensor(5.0)) / snr + torch.minimum(1 / snr, torch.tensor(8.0))
    expected = (weight * ((eps_hat - eps) ** 2).mean(dim=(1, 2, 3))).mean()
    assert float(simple) == pytest.approx(float(expected), rel=1e-5)

    kl = 0.0
    for b in range(2):
        a, a_prev = alpha_bar[t[b]], alpha_bar[t[b] - 1]
        beta = 1 - a / a_prev
        low, high = beta * (1 - a_prev) / (1 - a), beta
        x_t = a.sqrt() * x0[b] + (1 - a).sqrt() * eps[b]
        x0_hat = ((x_t - (1 - a).sqrt() * eps_hat[b]) / a.sqrt()).clamp(-1, 1)

        def mean(x, x_t=x_t, a=a, a_prev=a_prev, beta=beta):
            return a_prev.sqrt() * beta / (1 - a) * x + (a / a_prev).sqrt() * (1 - a_prev) / (1 - a) * x_t

        variance = torch.exp((v[b].tanh() + 1) / 2 * high.log() + (1 - v[b].tanh()) / 2 * low.log())
        true = torch.distributions.Normal(mean(x0[b]), low.sqrt())
        model = torch.distributions.Normal(mean(x0_hat), variance.sqrt())
        kl += torch.distributions.kl_divergence(true, model).mean() / np.log(2) / 2
    assert float(vlb) == pytest.approx(float(kl), rel=1e-4)


def test_card_baselines_are_what_they_say():
    """On white noise images the Wiener filter is the known scalar shrinkage; on one image the mean is exact."""
    from restore.training.card import measure_mean_loss, measure_nearest, measure_wiener_loss

    g = torch.Generator().manual_seed(0)
    training, held_out = torch.randn(400, 3, 16, 16, generator=g) * 0.5, torch.randn(50, 3, 16, 16, generator=g) * 0.5
    for a in (0.9, 0.5, 0.1):
        # x0 ~ N(0, s^2): the error of eps is a s^2 / (a s^2 + 1 - a).
        expected = a * 0.25 / (a * 0.25 + 1 - a)
        assert measure_wiener_loss(training, held_out, a) == pytest.approx(expected, rel=0.03)
        assert measure_mean_loss(training.mean(0), held_out, a) == pytest.approx(min(1.0, a / (1 - a) * 0.25), rel=0.03)
    found = measure_nearest(training[:3].flip(-1), training)
    assert found["max"] < 1e-3 and measure_nearest(held_out, training)["min"] > 0.3
