"""What changes no result: batches, order, threads; on a tiny prior, since only which numbers are equal matters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import operators
import restore
from restore.images import io
from restore.paths import data_dir


@pytest.fixture(scope="module")
def tiny(tiny_adm):
    return restore.load(tiny_adm, device="cpu")


@pytest.fixture(scope="module")
def face():
    return io.read_image(data_dir() / "photos" / "astronaut-face-64.png").pixels


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_one_restorer_in_two_threads(tiny, face):
    A = operators.SuperResolution(4)
    y = A.A(face[..., :16, :16])
    calls = [{"guidance": None}, {"guidance": restore.PAG(2.0, layers="m1")}]
    alone = [tiny(y, A, sampler="dps", steps=12, **options).samples for options in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            futures = [pool.submit(tiny, y, A, sampler="dps", steps=12, **options) for options in calls]
            for future, expected in zip(futures, alone, strict=True):
                assert torch.equal(future.result().samples, expected)
    assert not torch.equal(*alone)


def test_masks_and_kernels_of_each_image(tiny, face):
    """One operator for a batch in which every image has its own mask or kernel: alone, batched and with samples."""
    faces = torch.cat([face, face.flip(-1)])[..., :16, :16]
    masks = torch.cat([operators.random_mask(16, seed=seed) for seed in (0, 1)])
    kernels = torch.stack([operators.motion_kernel(9, 0.5, seed) for seed in (0, 1)])
    for both, make in ((masks, operators.Inpainting), (kernels, operators.Blur)):
        A = make(both)
        y = A.A(faces)
        # Not from the noisiest levels, where x_0 magnifies the rounding of eps a hundredfold.
        options = {"sampler": "dps", "steps": [1, 100, 200, 300, 400, 500], "zeta": 0.1, "image_ids": ["a", "b"]}
        together = tiny(y, A, samples=2, **options).samples
        assert together.shape == (2, 2, 3, 16, 16)
        assert relative(tiny(y, A, samples=2, batch_size=3, **options).samples, together) < 1e-5
        second = tiny(y[1:], make(both[1:]), samples=2, **{**options, "image_ids": ["b"]})
        assert torch.equal(second.samples[0], together[1])


def test_batches_ids_and_samples_do_not_change_a_result(tiny, face):
    A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    faces = torch.cat([face, face.flip(-1), face.roll(5, -1)])[..., :16, :16]
    y = A(faces, torch.Generator().manual_seed(0))
    options = {"steps": 12, "seed": 7, "guidance": restore.PAG(1.0, layers="m1"), "zeta": 0.1}
    together = tiny(y, A, image_ids=["a", "b", "c"], **options).samples
    batched = tiny(y, A, image_ids=["a", "b", "c"], batch_size=3, **options).samples
    assert relative(batched, together) < 1e-5
    reordered = tiny(y[[2, 0, 1]], A, image_ids=["c", "a", "b"], **options).samples
    assert torch.equal(reordered, together[[2, 0, 1]])
    alone = tiny(y[1:2], A, image_ids=["b"], samples=2, **options).samples
    assert torch.equal(alone[0, 0], together[1, 0]) and not torch.equal(alone[0, 0], alone[0, 1])
    again = tiny(y[1:2], A, image_ids=["other"], **options).samples
    assert not torch.equal(again[0, 0], together[1, 0])


def test_generation_depends_on_seed_and_index_alone(tiny):
    # Few steps divide by a tiny sqrt(alpha_bar) and magnify rounding: twelve are enough for the comparison.
    three = tiny.generate(3, steps=12, seed=3)
    assert torch.equal(three[:2], tiny.generate(2, steps=12, seed=3))
    assert relative(tiny.generate(3, steps=12, seed=3, batch_size=3), three) < 1e-5
    assert not torch.equal(three[0], three[1])
    assert tiny.generate(1, steps=2, size=(40, 72)).shape == (1, 3, 40, 72)
