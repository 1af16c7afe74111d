"""Every kind of training: the loss falls, an interrupted run equals an undisturbed one, the result restores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LDMPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

import operators
import restore
from restore.backbones.adm import ADM
from restore.backbones.autoencoder import load_vae
from restore.guidance import CFG, PAG
from restore.paths import configs_dir, data_dir
from restore.training import load_config, train
from restore.training.autoencoder import Autoencoder, PatchDiscriminator
from restore.training.autoencoder import measure as measure_autoencoder
from restore.training.card import measure, table
from restore.training.diffusion import Diffusion, build_model
from restore.training.sources import Pixels

QUICK = [
    "batch=4", "precision=fp32", "log_every=1", "held_out_every_steps=8", "samples_every_steps=24",
    "checkpoint_every_steps=2", "optimizer.warmup_steps=2", "data.held_out_every=4",
]  # fmt: skip
TINY = {
    "autoencoder": [
        "data.stored_size=32", "model.sample_size=32", "model.latent_channels=4", "model.norm_num_groups=4",
        "model.block_out_channels=[8,16]", "model.down_block_types=[DownEncoderBlock2D,DownEncoderBlock2D]",
        "model.up_block_types=[UpDecoderBlock2D,UpDecoderBlock2D]",
    ],
    "latent": [
        "data.stored_size=32", "data.copies=3", "model.sample_size=16", "model.in_channels=4", "model.out_channels=4",
        "model.block_out_channels=[16,32]", "model.down_block_types=[AttnDownBlock2D,AttnDownBlock2D]",
        "model.up_block_types=[AttnUpBlock2D,AttnUpBlock2D]", "model.attention_head_dim=8", "model.norm_num_groups=4",
    ],
    "prior-v2": [
        "model.block_out_channels=[16,32]", "model.down_block_types=[ResnetDownsampleBlock2D,AttnDownBlock2D]",
        "model.up_block_types=[AttnUpBlock2D,ResnetUpsampleBlock2D]", "model.sample_size=16", "init=null",
        "model.attention_head_dim=8", "model.norm_num_groups=4", "data.sets.faces.stored_size=32",
        "data.sets.flowers.stored_size=20", "data.sets.photos.stored_size=20", "data.sets.photos.crops=5",
    ],
}  # fmt: skip


def smooth(rng, *size):
    image = gaussian_filter(rng.normal(size=(*size, 3)), (3, 3, 0))
    return (127.5 + 127.5 * image / np.abs(image).max()).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Square faces, and photos of several sizes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, sizes in {"faces": [(32, 32)] * 12, "photos": [(30, 44), (61, 40), (25, 25), (90, 120)]}.items():
        (root / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(smooth(rng, *size)).save(root / name / f"{i:02d}.png")
    return root


def config(kind, folders, out, *settings):
    if kind == "prior-v2":
        where = [f"data.sets.{name}.folder={folders / 'photos'}" for name in ("flowers", "photos")]
        where.append(f"data.sets.faces.folder={folders / 'faces'}")
    else:
        where = [f"data.folder={folders / 'faces'}"]
    yaml = configs_dir() / "train" / f"{kind}.yaml"
    return load_config(yaml, [f"out={out}", *where, *QUICK, *TINY[kind], *settings])


@pytest.fixture(scope="module")
def autoencoder(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder")
    return train(config("autoencoder", folders, out, "steps=40", "optimizer.lr=2e-3")), out


@pytest.fixture(scope="module")
def latent(folders, autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent")
    return train(config("latent", folders, out, f"autoencoder={autoencoder[0]}", "steps=24")), out


@pytest.fixture(scope="module")
def classes(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("classes")
    return train(config("prior-v2", folders, out, "steps=24")), out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def falls(out, name):
    values = [row[name] for row in rows(out / "log.jsonl")]
    return np.mean(values[-6:]) < 0.9 * np.mean(values[:6])


def test_an_autoencoder_learns_and_is_one_of_diffusers(autoencoder, folders):
    folder, out = autoencoder
    assert falls(out, "l1") and {"kl", "l1", "images_per_second", "step"} == set(rows(out / "log.jsonl")[0])
    psnrs = [row["reconstruction"]["psnr"] for row in rows(out / "held_out.jsonl")]
    assert psnrs[-1] > psnrs[0] + 0.5 and (out / "samples" / "0000024.png").is_file()
    vae = AutoencoderKL.from_pretrained(folder)
    assert torch.equal(vae.decoder.conv_in.weight, load_vae(folder).decoder.conv_in.weight)


def test_a_latent_prior_learns_and_restores(latent, autoencoder):
    folder, out = latent
    assert falls(out, "eps_loss") and (out / "samples" / "0000024.png").is_file()
    cache = load_file(out / "latents.safetensors")
    assert cache["training"].shape == (27, 4, 16, 16) and cache["held_out"].shape == (3, 4, 16, 16)
    restorer = restore.load(folder, device="cpu")
    vae = restorer.backbone.vae
    assert vae.config.scaling_factor == pytest.approx(1 / float(cache["training"].float().std()))
    # The autoencoder inside is the one it was trained with, and diffusers' pipeline reads the whole.
    given = load_vae(autoencoder[0]).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in vae.state_dict().items())
    assert LDMPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"
    A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    y = A.A(torch.rand(1, 3, 32, 32) * 2 - 1)
    result = restorer(y, A, sampler="psld", steps=4, eta=0.1, gamma=0.01, guidance=PAG(1.0, layers="m1"))
    assert torch.isfinite(result.samples).all() and result.samples.shape == (1, 1, 3, 32, 32)


def test_a_prior_with_classes_learns_and_restores(classes):
    folder, out = classes
    assert falls(out, "eps_loss")
    held_out = rows(out / "held_out.jsonl")[-1]["eps_mse"]
    assert set(held_out) == {"face", "photo", "face without label", "photo without label"}
    restorer = restore.load(folder, device="cpu")
    model = restorer.backbone
    assert model.labels == ("face", "photo") and model.null_class == 2 and model.classes == 3
    A = operators.Denoising(noise=operators.GaussianNoise(0.2))
    y = torch.rand(1, 3, 16, 16) * 2 - 1
    options = {"sampler": "dps", "steps": 4, "zeta": 1.0}
    found = {label: restorer(y, A, label=label, **options).samples for label in (None, "face", "photo", 1, "1")}
    assert torch.equal(found["photo"], found[1]) and torch.equal(found[1], found["1"])
    assert not torch.equal(found["face"], found["photo"]) and not torch.equal(found[None], found["face"])
    # CFG's weak branch is the null class: w = 0 is the class alone.
    guided = {w: restorer(y, A, label="face", guidance=CFG(w), **options).samples for w in (0.0, 2.0)}
    assert torch.equal(guided[0.0], found["face"]) and not torch.equal(guided[2.0], found["face"])
    both = restorer(y, A, label="face", guidance=CFG(1.0) + PAG(1.0, layers="m1"), **options)
    assert torch.isfinite(both.samples).all()
    with pytest.raises(restore.RestoreError, match="no class called: 'fase'.*did you mean 'face'|did you mean 'face'"):
        restorer(y, A, label="fase", **options)
    with pytest.raises(restore.RestoreError, match="no class 3: the backbone has 3"):
        restorer.generate(1, labels=[3], steps=2)
    with pytest.raises(restore.RestoreError, match="either a label or another condition"):
        restorer(y, A, label="face", condition=torch.tensor([0]), **options)


@pytest.mark.parametrize("kind", TINY)
def test_interrupted_training_equals_undisturbed_training(kind, folders, autoencoder, tmp_path):
    more = {"latent": [f"autoencoder={autoencoder[0]}"], "autoencoder": ["discriminator.start=1"]}.get(kind, [])
    more += ["samples_every_steps=100", "held_out_every_steps=100", "discriminator.channels=8"][
        : 3 - (kind != "autoencoder")
    ]
    whole = train(config(kind, folders, tmp_path / "whole", "steps=4", *more))
    train(config(kind, folders, tmp_path / "parts", "steps=2", *more))
    parts = train(config(kind, folders, tmp_path / "parts", "steps=4", *more))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files and all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)
    short = train(config(kind, folders, tmp_path / "short", "steps=2", *more))
    assert any((whole / file).read_bytes() != (short / file).read_bytes() for file in files)


def test_an_autoencoder_learns_from_squares_of_its_images(folders, tmp_path):
    made = config("autoencoder", folders, tmp_path, "crop=16", "batch=6")
    kind, seen = Autoencoder(made, torch.device("cpu")), []

    def forward(x, noise):
        seen.append((x, noise.shape))
        return x, noise, noise

    _, logged, _ = kind.loss(forward, 3, torch.Generator().manual_seed(0))
    whole, _ = kind.source.batch(3, torch.Generator().manual_seed(0))
    ((x, latent),) = seen
    assert x.shape == (6, 3, 16, 16) and latent == (6, 4, 8, 8) and logged["l1"] == 0
    # Each is a square of its own image, at different places.
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)  # (6, 3, 17, 17, 16, 16)
    found = (windows == x[:, :, None, None]).flatten(-2).all(-1).all(1).nonzero()
    assert set(found[:, 0].tolist()) == set(range(6)) and len({tuple(row) for row in found[:, 1:].tolist()}) > 2


def assert_only_the_decoder_learned(before, after):
    """The encoder keeps its bits and every weight of the decoder moves; the bias of the attention's keys need not: the
    softmax takes no notice of it, so that its gradient is rounding error, and zero on some machines."""
    start, end = before.state_dict(), after.state_dict()
    same = {name for name, tensor in start.items() if torch.equal(tensor, end[name])}
    encoder = {name for name in start if name.startswith(("encoder.", "quant_conv."))}
    assert encoder <= same
    assert {name for name in same - encoder if not name.endswith("attentions.0.to_k.bias")} == set()


def test_a_decoder_is_trained_further_on_the_same_latents(folders, autoencoder, latent, tmp_path):
    """A prior trained on them stays valid: the encoder's weights keep their bits, the decoder gets better, and the
    prior takes it without encoding anything again."""
    start, more = autoencoder[0], ["frozen_encoder=true", "steps=60", "optimizer.lr=2e-3", "optimizer.weight_decay=0.1"]
    made = config("autoencoder", folders, tmp_path, f"init={start}", *more)
    before, after = load_vae(start), load_vae(train(made))
    assert_only_the_decoder_learned(before, after)
    held_out = Autoencoder(made, torch.device("cpu")).source.held_out[""]
    first, last = (measure_autoencoder(vae, held_out, "cpu", None)["psnr"] for vae in (before, after))
    assert last > first + 0.2
    shutil.copytree(latent[1], tmp_path / "latent")
    encoded = tmp_path / "latent" / "latents.safetensors"
    written = encoded.stat().st_mtime_ns
    folder = train(config("latent", folders, tmp_path / "latent", f"autoencoder={tmp_path / 'ema'}", "steps=24"))
    assert encoded.stat().st_mtime_ns == written
    new, old = (restore.load(path, device="cpu").backbone for path in (folder, latent[0]))
    assert torch.equal(new.vae.decoder.conv_in.weight, after.decoder.conv_in.weight)
    assert new.vae.config.scaling_factor == old.vae.config.scaling_factor
    assert all(torch.equal(a, b) for a, b in zip(new.network.parameters(), old.network.parameters(), strict=True))


def test_an_encoder_frozen_on_the_way_keeps_its_average(folders, tmp_path):
    """Which is what latents were made with; the live weights, where the average was heading, are given up."""
    quiet = ["samples_every_steps=100", "held_out_every_steps=100", "optimizer.lr=2e-3"]
    before = load_vae(train(config("autoencoder", folders, tmp_path, "steps=6", *quiet)))
    after = load_vae(train(config("autoencoder", folders, tmp_path, "steps=9", "frozen_encoder=true", *quiet)))
    assert_only_the_decoder_learned(before, after)


def test_a_run_that_is_out_of_time_ends_with_a_checkpoint(folders, tmp_path):
    train(config("autoencoder", folders, tmp_path, "minutes=0", "steps=100"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 0 and (tmp_path / "ema" / "config.json").is_file()
    assert not (tmp_path / "log.jsonl").exists()


def test_the_discriminator_comes_when_it_is_asked_for(folders, tmp_path):
    quiet = ["samples_every_steps=100", "held_out_every_steps=100", "discriminator.channels=8"]
    train(config("autoencoder", folders, tmp_path, "steps=2", *quiet))
    train(config("autoencoder", folders, tmp_path, "steps=5", "discriminator.start=3", *quiet))
    log = rows(tmp_path / "log.jsonl")
    assert ["judging" in row for row in log] == [False] * 3 + [True] * 2
    assert all(np.isfinite(row["judging"] + row["fooling"]) for row in log[3:])
    score = PatchDiscriminator(8)(torch.zeros(1, 3, 128, 96))
    assert score.shape == (1, 1, 14, 10)


def test_classes_start_from_weights_without_them_with_the_same_output(folders, tmp_path):
    """The whole configuration as it is shipped: no class changes the first output by a bit."""
    where = [f"data.sets.{name}.folder={folders / 'photos'}" for name in ("faces", "flowers", "photos")]
    yaml = configs_dir() / "train" / "prior-v2.yaml"
    torch.manual_seed(0)
    ADM(build_model(load_config(yaml, [*where, "init=null"]))).save(tmp_path / "start")
    shipped = load_config(yaml, [*where, f"init={tmp_path / 'start'}"])
    start, network = ADM.load(tmp_path / "start"), ADM(build_model(shipped, 2).eval(), null_class=2)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = start.predict(x, 300.0)
        for label in (0, 1, 2):
            found = network.predict(x, 300.0, torch.tensor([label]))
            assert torch.equal(found.eps, expected.eps) and torch.equal(found.variance, expected.variance)
    assert sum(p.numel() for p in network.network.parameters()) < 12.5e6
    # Weights that have the classes keep them.
    kept = build_model(load_config(yaml, [*where, f"init={data_dir() / 'embedded'}"]), 2)
    known = ADM.load(data_dir() / "embedded").network
    assert torch.equal(kept.class_embedding.weight, known.class_embedding.weight) and known.class_embedding.weight.any()


def test_the_shipped_networks_are_small_enough_for_the_repository():
    shapes = {
        name: OmegaConf.to_container(OmegaConf.load(configs_dir() / "train" / f"{name}.yaml").model) for name in TINY
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**shapes["autoencoder"])
        unet = build_model(OmegaConf.create({"model": shapes["latent"], "init": None}))
    total = sum(p.numel() for network in (vae, unet) for p in network.parameters())
    assert 15e6 < total < 20e6  # 40 MB as fp16
    side = shapes["autoencoder"]["sample_size"] >> (len(shapes["autoencoder"]["block_out_channels"]) - 1)
    assert side == shapes["latent"]["sample_size"]
    assert shapes["latent"]["in_channels"] == shapes["autoencoder"]["latent_channels"]


def test_label_dropout_replaces_labels_by_none(folders, tmp_path):
    for dropout, expected in ((1.0, {2}), (0.0, {0, 1})):
        made = config("prior-v2", folders, tmp_path, f"label_dropout={dropout}", "batch=8")
        kind, seen = Diffusion(made, torch.device("cpu")), []

        def forward(x_t, t, class_labels, return_dict, seen=seen):
            seen.append(class_labels)
            return (torch.zeros(len(x_t), 6, 16, 16),)

        kind.loss(forward, 0, torch.Generator().manual_seed(0))
        assert set(seen[0].tolist()) == expected


def test_sets_share_a_batch_and_keep_their_labels(folders, tmp_path):
    made = config("prior-v2", folders, tmp_path, "batch=20")
    source = Diffusion(made, torch.device("cpu")).source
    assert source.counts == [8, 5, 7] and source.labels == ("face", "photo")
    assert [len(one.training) for one in source.sets] == [9, 3 * 8, 3 * 5]
    assert {label: len(x) for label, x in source.held_out.items()} == {"face": 3, "photo": 4}
    x0, labels = source.batch(3, torch.Generator().manual_seed(0))
    again = source.batch(3, torch.Generator().manual_seed(0))
    assert torch.equal(x0, again[0]) and torch.equal(labels, again[1])
    assert labels.bincount().tolist() == [8, 12] and labels.tolist() != sorted(labels.tolist())
    several = config(
        "prior-v2", folders, tmp_path, f"data.sets.flowers.folder=[{folders / 'photos'},{folders / 'faces'}]"
    )
    assert len(Diffusion(several, torch.device("cpu")).source.sets[1].training) == 12 * 8


def test_the_mean_image_of_all_classes_is_that_of_the_batches(folders, tmp_path):
    """In a batch of 8 of shares 6, 1 and 1, whatever the sizes of the sets."""
    shares = ["data.sets.faces.share=6", "data.sets.flowers.share=1", "data.sets.photos.share=1"]
    made = config("prior-v2", folders, tmp_path, "batch=8", "data.sets.flowers.label=flower", *shares)
    source = Pixels(made, torch.device("cpu"))
    of = {label: source.training_x0(label).mean(0) for label in source.labels}
    assert source.labels == ("face", "flower", "photo")
    torch.testing.assert_close(source.mean_image, (6 * of["face"] + of["flower"] + of["photo"]) / 8)
    x0, labels = source.batch(0, torch.Generator())
    assert sorted(labels.tolist()) == [0] * 6 + [1, 2] and x0.shape == (8, *source.mean_image.shape)
    with pytest.raises(restore.RestoreError, match="batch=2 leaves no place for images of data.sets.flowers"):
        Pixels(config("prior-v2", folders, tmp_path, "batch=2", *shares), torch.device("cpu"))


def test_cards_of_every_kind(autoencoder, latent, classes, folders, tmp_path):
    cards = {
        "autoencoder": (autoencoder, [f"card.folders=[{folders / 'faces'}]"]),
        "latent": (latent, [f"autoencoder={autoencoder[0]}"]),
        "prior-v2": (classes, []),
    }
    for kind, ((weights, out), more) in cards.items():
        made = config(kind, folders, out, *more)
        card = measure(made, weights, tmp_path / kind, samples=4, steps=3)
        assert json.loads((tmp_path / kind / "card.json").read_text()) == json.loads(json.dumps(card))
        assert (tmp_path / kind / ("pairs.png" if kind == "autoencoder" else "samples.png")).is_file()
        text = table(card)
        if kind != "prior-v2":
            assert 5 < card["reconstruction"]["held-out images"]["psnr"] < 60 and "reconstruction" in text
        if kind != "autoencoder":
            losses = card["held_out_eps_mse"]
            baselines = [name for name in losses if name.startswith("Wiener")]
            assert len(baselines) == (2 if kind == "prior-v2" else 1)
            of_all = {f"mean image of all, {label}" for label in ("face", "photo")}
            assert of_all & set(losses) == (of_all if kind == "prior-v2" else set())
            assert all(0 < value < 1.1 for name in baselines for value in losses[name])
            assert card["nearest_training_image"]["samples"]["min"] > 0 and "noise / signal" in text
    assert card["held_out_images"] == {"face": 3, "photo": 4} and "model, photo without label" in text


def test_refusals(folders, autoencoder, tmp_path):
    with pytest.raises(restore.RestoreError, match="is not a folder with a trained autoencoder"):
        train(config("latent", folders, tmp_path, "autoencoder=nowhere"))
    with pytest.raises(restore.RestoreError, match="latents of 4 channels, but model.in_channels is 8"):
        train(config("latent", folders, tmp_path, f"autoencoder={autoencoder[0]}", "model.in_channels=8"))
    with pytest.raises(restore.RestoreError, match="unknown kind.*did you mean 'latents'"):
        config("latent", folders, tmp_path, "kind=latent", f"autoencoder={autoencoder[0]}")
    with pytest.raises(restore.RestoreError, match="leaves autoencoder open; give autoencoder="):
        config("latent", folders, tmp_path)
    for crop in (15, 0, 64):
        with pytest.raises(restore.RestoreError, match=f"crop={crop} must be a multiple of 2 and at most 32"):
            train(config("autoencoder", folders, tmp_path, f"crop={crop}"))
    with pytest.raises(restore.RestoreError, match="has no key"):
        config("latent", folders, tmp_path, "autoencoder=x", "crop=16")
    with pytest.raises(restore.RestoreError, match="do not have the shapes"):
        train(config("autoencoder", folders, tmp_path, f"init={autoencoder[0]}", "model.latent_channels=6"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_the_shipped_configurations_train_and_resume(kind, folders, tmp_path):
    """The networks in their true size, a few steps in two parts, on images of the size they want."""
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    for i in range(21):
        Image.fromarray(smooth(rng, 128, 128)).save(tmp_path / "images" / f"{i:02d}.png")
    quick = ["batch=4", "log_every=1", "held_out_every_steps=3", "samples_every_steps=100", f"out={tmp_path / 'run'}"]
    where = [f"data.folder={tmp_path / 'images'}"]
    if kind == "prior-v2":
        where = [f"data.sets.{name}.folder={tmp_path / 'images'}" for name in ("faces", "flowers", "photos")]
        where += [f"init={data_dir() / 'embedded'}", "data.sets.photos.crops=4"]
    if kind == "latent":
        AutoencoderKL(
            **OmegaConf.to_container(OmegaConf.load(configs_dir() / "train" / "autoencoder.yaml").model)
        ).save_pretrained(tmp_path / "vae")
        where += [f"autoencoder={tmp_path / 'vae'}", "data.copies=2"]
    yaml = configs_dir() / "train" / f"{kind}.yaml"
    train(load_config(yaml, [*quick, *where, "steps=2"]))
    folder = train(load_config(yaml, [*quick, *where, "steps=3"]))
    log = rows(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3] and len(rows(tmp_path / "run" / "held_out.jsonl")) == 1
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert size < 42e6
    if kind != "autoencoder":
        side = 64 if kind == "prior-v2" else 128
        assert restore.load(folder, device="cpu").generate(1, steps=2).shape == (1, 3, side, side)
