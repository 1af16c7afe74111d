"""The prior of photos: its noise levels and its patches."""

import torch
from omegaconf import OmegaConf
from tiny_training import QUICK

import restore
from restore.backbones.schedule import Schedule
from restore.paths import configs_dir
from restore.training import load_training_config, train
from restore.training.card import write_card
from restore.training.diffusion import Diffusion, place_times, weigh_levels

TINY = [
    "model.block_out_channels=[8,16]",
    "model.down_block_types=[DownBlock2D,DownBlock2D]",
    "model.up_block_types=[UpBlock2D,UpBlock2D]",
    "model.sample_size=12",
    "model.norm_num_groups=4",
    "crop=16",
    "data.sets.photos.crops=3",
    "data.sets.textures.crops=3",
    "data.stored_size=24",
]


def config(folders, out, *settings):
    sets = ("photos", "textures", "flowers")
    where = [f"data.sets.{name}.folder={folders / 'photos'}" for name in sets]
    where += [f"data.sets.{name}.stored_size=24" for name in sets]
    return load_training_config(
        configs_dir() / "train" / "photo.yaml", [f"out={out}", *where, *QUICK, *TINY, "batch=8", *settings]
    )


def test_most_noise_levels_are_those_of_denoising():
    """The first share of a batch is even in log sigma / alpha between the bounds, the rest even over the schedule."""
    alpha_bar = Schedule.from_config({"beta_schedule": "linear"}).alphas_cumprod
    slots = (torch.arange(1000) + 0.5) / 1000
    t = place_times(slots, alpha_bar, OmegaConf.create({"share": 0.75, "low": 0.02, "high": 0.5}))
    levels = ((1 - alpha_bar) / alpha_bar).sqrt().double()
    expected = 0.02 * 25 ** (slots[:750].double() / 0.75)
    # Off by less than a step of the schedule, whose levels are 0.001 to 0.005 apart here.
    torch.testing.assert_close(levels[t[:750]], expected, atol=0.006, rtol=0)
    torch.testing.assert_close(t[750:].double(), torch.linspace(0, 999, 250).double(), atol=4, rtol=0)
    assert torch.equal(place_times(slots, alpha_bar, None), torch.arange(1000))
    only = place_times(slots, alpha_bar, OmegaConf.create({"share": 1.0, "low": 0.02, "high": 0.5}))
    assert levels[only.max()] < 0.51


def test_the_weight_of_a_level_is_the_inverse_of_its_usual_error():
    """1 + k sigma/alpha; without k the weights of Min-SNR and of the high levels."""
    alpha_bar = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    weights = weigh_levels(alpha_bar, OmegaConf.create({"denoising": {"weight": 33.0}}))
    expected = [1 + 33 * (1 / 99) ** 0.5, 34.0, 1 + 33 * 99**0.5]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    minimum = {"denoising": {"share": 1.0, "low": 0.1, "high": 0.5}, "snr_gamma": 5.0, "high_noise_weight": 8.0}
    expected = [5 / 99 + 1 / 99, 1 + 1, 1 + 8]
    torch.testing.assert_close(weigh_levels(alpha_bar, OmegaConf.create(minimum)), alpha_bar.new_tensor(expected))


def test_a_network_of_patches_learns_from_crops(folders, tmp_path):
    settings = config(folders, tmp_path, "steps=2")
    seen = []

    def forward(x, t, **options):
        seen.append((x.shape, t))
        return (torch.zeros_like(x),)

    loss, _, _ = Diffusion(settings, torch.device("cpu")).loss(forward, 0, torch.Generator().manual_seed(0))
    ((shape, t),) = seen
    assert shape == (8, 12, 8, 8) and (t < 200).sum() >= 6 and loss > 0
    backbone = restore.load(train(settings)).backbone
    assert (backbone.patch, backbone.resolution, backbone.channels) == (2, 24, 3)


def test_the_card_of_a_network_of_crops_compares_images_of_one_size(folders, tmp_path):
    settings = config(folders, tmp_path / "out", "steps=1")
    card = write_card(settings, train(settings), tmp_path / "card", samples=1, steps=2)
    assert card["nearest_training_image"]["samples"]["min"] > 0


def test_the_learning_rate_falls_to_zero(folders, tmp_path):
    """The last step of the decay changes nothing, and a resumed run has the same rate."""
    from safetensors.torch import load_file

    def weights(*settings):
        return load_file(
            train(config(folders, tmp_path, "optimizer.decay=[1,3]", *settings)) / "diffusion_pytorch_model.safetensors"
        )

    rows = [weights(f"steps={n}", "ema.decay=0.0") for n in (2, 3, 4)]
    moved = [max(float((a[k] - b[k]).abs().max()) for k in a) for a, b in zip(rows, rows[1:], strict=False)]
    assert moved[0] > 0 and moved[1] == 0
