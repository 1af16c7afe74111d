"""Training a pixel prior with classes: sets that share a batch, labels and the null class, initial weights."""

from __future__ import annotations

import pytest
import torch
from tiny_training import config, falls, rows

import operators
import restore
from restore.backbones.adm import ADM
from restore.guidance import CFG, PAG
from restore.paths import configs_dir, data_dir
from restore.training import load_training_config
from restore.training.diffusion import Diffusion, build_unet
from restore.training.sources import Pixels


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
    # CFG's weak pass is the null class: w = 0 is the conditional prediction.
    guided = {w: restorer(y, A, label="face", guidance=CFG(w), **options).samples for w in (0.0, 2.0)}
    assert torch.equal(guided[0.0], found["face"]) and not torch.equal(guided[2.0], found["face"])
    both = restorer(y, A, label="face", guidance=CFG(1.0) + PAG(1.0, layers="m1"), **options)
    assert torch.isfinite(both.samples).all()
    with pytest.raises(restore.RestoreError, match="no class called: 'fase'.*did you mean 'face'|did you mean 'face'"):
        restorer(y, A, label="fase", **options)
    with pytest.raises(restore.RestoreError, match="no class 3: the backbone has 3"):
        restorer.generate(1, labels=[3], steps=2)
    with pytest.raises(restore.RestoreError, match="label.*condition"):
        restorer(y, A, label="face", condition=torch.tensor([0]), **options)


def test_classes_start_from_weights_without_them_with_the_same_output(folders, tmp_path):
    """The whole configuration as it is shipped: no class changes the first output by a bit."""
    where = [f"data.sets.{name}.folder={folders / 'photos'}" for name in ("faces", "flowers", "photos")]
    yaml = configs_dir() / "train" / "prior-v2.yaml"
    torch.manual_seed(0)
    ADM(build_unet(load_training_config(yaml, [*where, "init=null"]))).save(tmp_path / "start")
    shipped = load_training_config(yaml, [*where, f"init={tmp_path / 'start'}"])
    start, network = ADM.load(tmp_path / "start"), ADM(build_unet(shipped, 2).eval(), null_class=2)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = start.predict(x, 300.0)
        for label in (0, 1, 2):
            found = network.predict(x, 300.0, torch.tensor([label]))
            assert torch.equal(found.eps, expected.eps) and torch.equal(found.variance, expected.variance)
    assert sum(p.numel() for p in network.network.parameters()) < 12.5e6
    # Weights that have the classes keep them.
    kept = build_unet(load_training_config(yaml, [*where, f"init={data_dir() / 'embedded'}"]), 2)
    known = ADM.load(data_dir() / "embedded").network
    assert torch.equal(kept.class_embedding.weight, known.class_embedding.weight) and known.class_embedding.weight.any()


def test_label_dropout_replaces_labels_by_none(folders, tmp_path):
    for dropout, expected in ((1.0, {2}), (0.0, {0, 1})):
        settings = config("prior-v2", folders, tmp_path, f"label_dropout={dropout}", "batch=8")
        kind, seen = Diffusion(settings, torch.device("cpu")), []

        def forward(x_t, t, class_labels, return_dict, seen=seen):
            seen.append(class_labels)
            return (torch.zeros(len(x_t), 6, 16, 16),)

        kind.loss(forward, 0, torch.Generator().manual_seed(0))
        assert set(seen[0].tolist()) == expected


def test_sets_share_a_batch_and_keep_their_labels(folders, tmp_path):
    settings = config("prior-v2", folders, tmp_path, "batch=20")
    source = Diffusion(settings, torch.device("cpu")).source
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
    """In a batch of 8 with shares 6, 1 and 1, independent of the sizes of the sets."""
    shares = ["data.sets.faces.share=6", "data.sets.flowers.share=1", "data.sets.photos.share=1"]
    settings = config("prior-v2", folders, tmp_path, "batch=8", "data.sets.flowers.label=flower", *shares)
    source = Pixels(settings, torch.device("cpu"))
    of = {label: source.training_x0(label).mean(0) for label in source.labels}
    assert source.labels == ("face", "flower", "photo")
    torch.testing.assert_close(source.mean_image, (6 * of["face"] + of["flower"] + of["photo"]) / 8)
    x0, labels = source.batch(0, torch.Generator())
    assert sorted(labels.tolist()) == [0] * 6 + [1, 2] and x0.shape == (8, *source.mean_image.shape)
    with pytest.raises(restore.RestoreError, match="batch=2 is too small for images of data.sets.flowers"):
        Pixels(config("prior-v2", folders, tmp_path, "batch=2", *shares), torch.device("cpu"))
