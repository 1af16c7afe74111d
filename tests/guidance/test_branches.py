"""Weak branches beside PAG and CFG: each against a reference written out here, in float64, and all of them at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_sd import SCHEDULER, tiny_unet, tiny_vae

import operators
from operators import RestoreError
from restore import zoo
from restore.backbones.adm import ADM
from restore.backbones.base import variance_preserving
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized, blend_weights, window_starts
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import (
    PAG,
    SAG,
    SWG,
    TPG,
    TSG,
    AttentionRecord,
    Autoguidance,
    build_guidance,
    describe_guidance,
    estimator,
)
from restore.guidance import targets as T
from restore.guidance.pipelines import guided
from restore.samplers.dps import dps
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise

GOLDEN = Path(__file__).parent.parent / "golden"
MIDDLE = "mid_block.attentions.0"


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def double(**options):
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16, **options)
    model.network.double()
    return model


@pytest.fixture(scope="module")
def model():
    return double()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weak_of(guidance, backbone, x, t, condition=None):
    """eps_weak, taken from a guided prediction with scale 1: 2 eps − eps_guided."""
    with torch.no_grad(), estimator(backbone, guidance) as estimate:
        strong, eps = estimate(x, t, condition)
    return 2 * strong.eps - eps


def blur_matrix(n, taps, sigma):
    """(n, n): a Gaussian blur with reflection, written down entry by entry."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    weights = [torch.exp(torch.tensor(-0.5 * (d / sigma) ** 2, dtype=torch.float64)) for d in range(-taps, taps + 1)]
    for i in range(n):
        for d, weight in zip(range(-taps, taps + 1), weights, strict=True):
            j = abs(i + d)
            matrix[i, 2 * (n - 1) - j if j >= n else j] += weight / sum(weights)
    return matrix


def maps_of(model, x, t, path=MIDDLE):
    """(prediction, attention maps, (h, w)) of a layer, made from its input and its weights."""
    attn, seen = model.attention[path].module, []
    handle = attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        prediction = model.predict(x, t)
    handle.remove()
    h = attn.group_norm(seen[0].flatten(2)).transpose(1, 2)
    q, k = (to(h).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k))
    return prediction, (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), tuple(seen[0].shape[-2:])


def test_sag_is_the_official_one():
    golden = load_file(GOLDEN / "pag_eps.safetensors")
    case = json.loads((GOLDEN / "pag_eps.json").read_text())["sag"]["sag"]
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    guidance = SAG(case["guide_scale"] - 1, "m1", case["threshold"], case["blur_sigma"], case["kernel_size"])
    t = int(golden["sag.t"])
    with torch.no_grad(), estimator(model, guidance) as estimate:
        strong, eps = estimate(golden["sag.x_t"], t)
    assert relative(strong.eps, golden["sag.eps"]) < 1e-5
    assert relative(eps, golden["sag.guided_eps"]) < 1e-5
    assert relative(weak_of(SAG(1.0), model, golden["sag.x_t"], t), golden["sag.eps_degraded"]) < 1e-5  # the defaults


@pytest.mark.parametrize("size", [(32, 32), (32, 16)])
@pytest.mark.parametrize("layers, heads", [("m1", slice(None)), ("m1:1", [1]), ("i7:0,2", [0, 2])])
def test_sag(model, x, size, layers, heads):
    x = x[..., : size[0], : size[1]]
    t = 300
    path = MIDDLE if layers.startswith("m1") else next(p for p, a in model.attention.items() if a.short == "i7")
    strong, maps, grid = maps_of(model, x, t, path)
    received = maps[:, heads].mean(1).sum(1)
    assert torch.allclose(received.mean(1), torch.ones(2, dtype=torch.float64))
    mask = (received > 0.98).view(2, 1, *grid).repeat_interleave(size[0] // grid[0], 2)
    mask = mask.repeat_interleave(size[1] // grid[1], 3)
    assert 0 < float(mask.double().mean()) < 1
    x0 = strong.x0.clamp(-1, 1)
    rows, columns = (blur_matrix(n, 3, 2.0) for n in size)
    blurred = torch.einsum("ij,bcjk,lk->bcil", rows, x0, columns)
    a = Schedule.from_config({}).alphas_cumprod[t]
    degraded = a.sqrt() * torch.where(mask, blurred, x0) + (1 - a).sqrt() * strong.eps
    with torch.no_grad():
        expected = model.predict(degraded, t).eps
    got = weak_of(SAG(1.0, layers, threshold=0.98, sigma=2.0, taps=7), model, x, t)
    assert relative(got, expected) < 1e-12 and relative(expected, strong.eps) > 1e-4


def test_sag_on_windows_blends_what_each_attended_to(model, x):
    """At 32 x 48 with windows of 32: the mask is where the blended attention is above the threshold."""
    x = torch.cat([x, x.flip(-1)[..., :16]], dim=-1)
    small = double(resolution=32)
    prior = Sized(small, 32, 48, max_windows=2)  # one window of the two images in each call
    strong, got = prior.predict(x, 300), weak_of(SAG(1.0, sigma=2.0, taps=7), prior, x, 300)
    received, weights = torch.zeros(2, 1, 32, 48, dtype=torch.float64), blend_weights([0, 16], 32, 48).double()
    for start, weight in zip([0, 16], weights, strict=True):
        _, maps, grid = maps_of(small, x[..., start : start + 32], 300)
        seen = maps.mean(1).sum(1).view(2, 1, *grid)
        received[..., start : start + 32] += F.interpolate(seen, (32, 32)) * weight
    x0 = strong.x0.clamp(-1, 1)
    blurred = torch.einsum("ij,bcjk,lk->bcil", blur_matrix(32, 3, 2.0), x0, blur_matrix(48, 3, 2.0))
    a = Schedule.from_config({}).alphas_cumprod[300]
    with torch.no_grad():
        expected = prior.predict(
            a.sqrt() * torch.where(received > 1, blurred, x0) + (1 - a).sqrt() * strong.eps, 300
        ).eps
    assert relative(got, expected) < 1e-6  # the windows' weights are float32
    assert relative(got, weak_of(SAG(1.0, sigma=2.0, taps=7), Sized(small, 32, 48, max_windows=4), x, 300)) < 1e-6


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("sigma", [0.4, 1.5, 40.0])
def test_seg(grid, sigma):
    """Attention of the queries blurred on the grid, in float64; the kernel ends at half of the grid's side."""
    n, generator = grid[0] * grid[1], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    reach = [min(-(-6 * sigma // 1) // 2, side // 2) for side in grid]
    rows, columns = (blur_matrix(side, int(r), sigma) for side, r in zip(grid, reach, strict=True))
    image = torch.einsum("ij,bhjkd,lk->bhild", rows, q.unflatten(2, grid), columns).flatten(2, 3)
    expected = (image @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    assert relative(T.find_target({"seg": {"sigma": sigma}})(AttentionRecord(q, k, v, grid=grid)), expected) < 1e-12
    # In joint attention the text's queries stay.
    text = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64)
    joined = [torch.cat([text, part], dim=2) for part in (q, k, v)]
    expected = (torch.cat([text, image], dim=2) @ joined[1].transpose(-2, -1) / 8**0.5).softmax(-1) @ joined[2]
    record = AttentionRecord(*joined, grid=grid, image=slice(2, n + 2))
    assert relative(T.seg(sigma)(record), expected) < 1e-12


def test_seg_knows_the_grid_of_a_network(model, x):
    """In the network, at a size that is not square; without end it is the mean query."""
    x = x[..., :24]
    items = PAG(1.0, "m1", target={"seg": {"sigma": 0.7}}).perturbed_layers(model)
    attn, grid = model.attention[MIDDLE].module, []
    true, seen = items[0].target, []
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target=lambda a: seen.append(a) or true(a))) as estimate:
        eps = estimate(x, 300)[1]
    grid = seen[0].grid
    assert grid[0] * grid[1] == seen[0].q.shape[2] and grid[0] != grid[1] and attn.heads == seen[0].q.shape[1]
    q = torch.einsum(
        "ij,bhjkd,lk->bhild", blur_matrix(grid[0], 2, 0.7), seen[0].q.unflatten(2, grid), blur_matrix(grid[1], 1, 0.7)
    )
    expected = (q.flatten(2, 3) @ seen[0].k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ seen[0].v
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target=lambda a: expected)) as estimate:
        assert relative(estimate(x, 300)[1], eps) < 1e-12
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target="seg")) as estimate:
        infinite = estimate(x, 300)[1]
    with torch.no_grad(), estimator(model, PAG(1.0, "m1", target="mean_query")) as estimate:
        assert torch.equal(estimate(x, 300)[1], infinite) and relative(infinite, eps) > 1e-6


def latents():
    null = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return StableDiffusion(tiny_unet().double(), tiny_vae().double(), Schedule.from_config(SCHEDULER), null)


def reordered(module, order):
    """Attention, feed-forward nets and norms of tokens commute with their order: the output's tokens, reordered."""

    def hook(module, args, output):
        if output.ndim == 3:
            return output[:, order]
        return output.flatten(2)[..., order].view(output.shape)

    return module.register_forward_hook(hook)


def test_tpg(model, x):
    with torch.no_grad():
        got = weak_of(TPG(1.0, "m1", noise=5), model, x, 40)
        attn = model.attention[MIDDLE].module
        order = T.seeded_draw(5, 40)("uniform", (1, 16))[0].argsort()
        handle = reordered(attn, order)
        expected = model.predict(x, 40).eps
        handle.remove()
        assert sorted(order.tolist()) == list(range(16)) and order.tolist() != list(range(16))
        assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, 40).eps) > 1e-4


def test_tpg_reorders_whole_transformer_blocks():
    model = latents()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = next(layer for layer in model.attention.values() if layer.short == "m1")
    block = model.network.get_submodule(layer.path.removesuffix(".attn1"))
    tokens = []
    handle = block.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    with torch.no_grad():
        model.predict(z, 40)
        handle.remove()
        handle = reordered(block, T.seeded_draw(0, 40)("uniform", (1, tokens[0]))[0].argsort())
        expected = model.predict(z, 40).eps
        handle.remove()
        assert relative(weak_of(TPG(1.0, "m1"), model, z, 40), expected) < 1e-12
        assert relative(expected, model.predict(z, 40).eps) > 1e-6


@pytest.mark.parametrize("s, alpha", [(2.0, 1.0), (0.5, 0.0), (3.0, 0.25)])
def test_tsg(model, x, s, alpha):
    t, n = 250, T.seeded_draw(3, 250)("normal", (1, model.network.time_embedding.linear_2.out_features)).double()

    def noisy(module, args, output):
        deviation = ((output - output.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (output.shape[1] - 1)
        return output + s * (t / 999) ** alpha * deviation.sqrt() * n

    handle = model.network.time_embedding.register_forward_hook(noisy)
    with torch.no_grad():
        expected = model.predict(x, t).eps
    handle.remove()
    got = weak_of(TSG(1.0, s=s, alpha=alpha, noise=3), model, x, t)
    assert relative(got, expected) < 1e-12 and relative(got, model.predict(x, t).eps) > 1e-4


@pytest.mark.parametrize("shift", [40, -60.5, 2000])
def test_tsg_at_another_time(model, x, shift):
    with torch.no_grad():
        told = torch.tensor([min(250 + shift, 999.0)])
        expected = model.network(x, told).sample[:, :3]
    assert relative(weak_of(TSG(1.0, s=0, shift=shift), model, x, 250), expected) < 1e-12


def test_autoguidance(model, x, tiny_adm, monkeypatch):
    weak = ADM.load(tiny_adm)
    weak.network.double()
    with torch.no_grad():
        expected = weak.predict(x, 250).eps
        assert relative(weak_of(Autoguidance(1.0, weak), model, x, 250), expected) < 1e-12
        # One with other noise levels is asked where they are the same.
        other = ADM(weak.network, schedule="cosine")
        t = other.schedule.t(model.schedule.ratio(250))
        assert abs(t - 250) > 10
        expected = other.predict(x, t).eps
        assert relative(weak_of(Autoguidance(1.0, other), model, x, 250), expected) < 1e-12
    guidance = Autoguidance(1.0, tiny_adm)  # a folder
    loads, load = [], zoo.load_backbone
    monkeypatch.setattr(zoo, "load_backbone", lambda *args, **options: loads.append(args) or load(*args, **options))
    with estimator(model, guidance), estimator(model, guidance):
        assert len(loads) == 1
    assert build_guidance(describe_guidance(guidance)).terms == (guidance,)


def test_autoguidance_by_the_model_itself_changes_nothing(x, tiny_adm):
    model = ADM.load(tiny_adm)
    with torch.no_grad(), estimator(model, Autoguidance(3.0, str(tiny_adm))) as estimate:
        strong, eps = estimate(x.float(), 250)
    assert torch.equal(eps, strong.eps)


def test_swg(x, tiny_adm):
    model = ADM.load(tiny_adm)
    model.network.double()
    x = x[..., :16, :12]
    starts = {n: window_starts(n, 8, 4) for n in (16, 12)}
    rows, columns = (blend_weights(starts[n], 8, n).double() for n in (16, 12))
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for top, w in zip(starts[16], rows, strict=True):
            for left, v in zip(starts[12], columns, strict=True):
                eps = model.predict(x[..., top : top + 8, left : left + 8], 250).eps
                expected[..., top : top + 8, left : left + 8] += w[:, None] * v * eps
    assert len(starts[16]) == 3 and relative(weak_of(SWG(1.0, 8), Sized(model, 16, 12), x, 250), expected) < 1e-6
    assert relative(weak_of(SWG(1.0, 8), model, x, 250), expected) < 1e-6


BRANCHES = {
    "sag": "{sag: {scale: %s, threshold: 0.99, sigma: 2, taps: 5}}",
    "seg": "{pag: {scale: %s, layers: m1, target: {seg: {sigma: 1}}}}",
    "tpg": "{tpg: {scale: %s, layers: m1, noise: 2}}",
    "tsg": "{tsg: {scale: %s, s: 1}}",
    "autoguidance": "{autoguidance: {scale: %s, model: WEAK}}",
    "swg": "{swg: {scale: %s, window: 8}}",
}


def configured(name, scale, weak):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.create("[" + BRANCHES[name] % scale + "]"))
    if name == "autoguidance":
        config[0][name]["model"] = str(weak)
    return config


@pytest.fixture(scope="module")
def weaker(tmp_path_factory):
    """An earlier checkpoint, so to speak: the tiny network with other weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("weaker")
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        out_channels=6,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    ADM(network).save(folder)
    return folder


def state_of(network):
    return [dict(module.__dict__) for module in network.modules()]


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch_with_sampler_windows_prefix_and_combination(name, tiny_adm, weaker):
    model = ADM.load(tiny_adm)
    before = state_of(model.network)
    config = configured(name, 1.5, weaker)
    guidance = build_guidance(config)
    assert build_guidance(json.loads(json.dumps(describe_guidance(guidance)))) == guidance

    # Generation beyond the network's size, and a sampler that differentiates through it.
    def run(guidance, size=(16, 24)):
        prior = Sized(model, *size, recompute_windows=True)
        noise = ImageNoise([(0, "a", 0), (0, "b", 0)])
        generated = generate(prior, 2, noise=noise, steps=3, guidance=guidance)
        operator = operators.SuperResolution(2)
        y = operator.A(torch.zeros(2, 3, *size))
        return generated, dps(prior, operator, y, noise=noise, steps=2, zeta=0.1, guidance=guidance), prior.evaluations

    plain, off, on = run(None), run(build_guidance(configured(name, 0, weaker))), run(guidance)
    assert torch.equal(plain[0], off[0]) and torch.equal(plain[1], off[1]) and plain[2] == off[2] == 5
    assert on[2] == 10 and torch.isfinite(on[1]).all()
    assert all(relative(a, b) > 1e-5 for a, b in zip(on[:2], plain[:2], strict=True))

    # The same bits with and without a shared prefix, another combination, and an image without company.
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for share in (True, False):
        with torch.no_grad(), estimator(model, guidance, share_prefix=share) as estimate:
            results += [estimate(x, 500)[1] for _ in range(2)]
            if share and name in ("seg", "tpg"):
                assert estimate.tapes[0].queues  # something is taken from the strong pass
    assert all(torch.equal(eps, results[0]) for eps in results)
    with torch.no_grad(), estimator(model, guidance) as estimate:
        assert relative(estimate(x[1:], 500)[1], results[0][1:]) < 1e-5
    with torch.no_grad(), estimator(model, build_guidance([*config, {"combine": "apg"}])) as estimate:
        assert relative(estimate(x, 500)[1], results[0]) > 1e-6
    with torch.no_grad(), estimator(variance_preserving(Sized(model, 16, 16)), guidance) as estimate:
        assert relative(estimate(x, 500)[1], results[0]) < 1e-5

    # A weak pass that fails leaves the network as it was.
    class Failing(ADM):
        def predict(self, x_t, t, condition=None):
            prediction = super().predict(x_t, t, condition)
            if not torch.is_grad_enabled():
                raise KeyError
            return prediction

    failing = Failing(model.network)
    if name != "autoguidance":
        with pytest.raises(KeyError), estimator(failing, guidance) as estimate:
            estimate(x, 500)
    assert state_of(model.network) == before


@pytest.mark.parametrize("name", [name for name in BRANCHES if name != "autoguidance"])
def test_latents(name):
    model = latents()
    config = configured(name, 1.5, None)
    config[0].get("swg", {})["window"] = 16
    z = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prior = Sized(model, 32, 48)
    with torch.no_grad(), estimator(prior, build_guidance(config)) as estimate:
        strong, eps = estimate(z, 400)
    assert eps.shape == z.shape and relative(eps, strong.eps) > 1e-6


def test_inside_a_pipeline(tiny_adm):
    """What changes the network works there; what needs clean estimates or images says so."""
    unet = tiny_unet()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = unet(x, 400, text).sample
        for guidance in (TPG(1.0, "m1"), TSG(1.0, alpha=0.0), PAG(1.0, "m1", target={"seg": {"sigma": 1.0}})):
            with guided(unet, guidance):
                assert relative(unet(x, 400, text).sample, plain) > 1e-6
        assert torch.equal(unet(x, 400, text).sample, plain)
    for guidance in (SAG(1.0), Autoguidance(1.0, str(tiny_adm)), SWG(1.0, 8)):
        with pytest.raises(RestoreError, match="needs clean estimates"), guided(unet, guidance):
            pass
    with pytest.raises(RestoreError, match="noise levels are unknown"), guided(unet, TSG(1.0)):
        pass


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: SAG(1.0, "i7,m1"), "one attention layer, got 2"),
        (lambda: SAG(1.0, taps=4), "odd taps"),
        (lambda: SAG(1.0, sigma=0), "positive sigma"),
        (lambda: TPG(1.0, "m1:0"), "name no heads"),
        (lambda: TSG(1.0, s=0), "s > 0 or a shift"),
        (lambda: SWG(1.0, 12), "a multiple of 8 and less than 64"),
        (lambda: SWG(1.0, 64), "a multiple of 8 and less than 64"),
        (lambda: Autoguidance(1.0, "no-such-model"), "no-such-model"),
        (
            lambda: Autoguidance(1.0, latents()),
            "3 channels at 1/1 .*, got StableDiffusion with 4 at 1/4",
        ),
        (lambda: PAG(1.0, "m1", target={"seg": {"sigma": 0}}), "sigma must be positive, got 0"),
        (lambda: PAG(1.0, "m1", target={"seg": {"sgima": 1}}), "target seg has no option 'sgima'; did you mean"),
        (lambda: PAG(1.0, "m1", target={"identity": {"sigma": 1}}), "unknown target with options 'identity'"),
        (
            lambda: build_guidance({"sag": {"scale": 1, "layer": "m1"}}),
            "guidance.sag has no option 'layer'; did you mean 'lay",
        ),
        (lambda: build_guidance({"autoguidance": {"scale": 1}}), "needs the option 'model'"),
    ],
)
def test_mistakes(model, make, match):
    with pytest.raises(RestoreError, match=match) as error, estimator(model, make()):
        pass
    assert "\n" not in str(error.value)


def test_seg_without_a_grid():
    with pytest.raises(RestoreError, match="grid of image tokens"):
        T.seg(2.0)(AttentionRecord(*[torch.zeros(1, 1, 4, 2)] * 3))
