"""TPG, TSG and SAG on SD3, SD3.5, FLUX and DiT, each against what it is defined to compute, made with hooks and
explicit attention maps in float64."""

from __future__ import annotations

import pytest
import tiny_flow
import torch

from restore.backbones.transformers import SD3, DiT, Flux
from restore.guidance import SAG, TPG, TSG, estimator
from restore.guidance import targets as T

HEADS, TOKENS = tiny_flow.HEADS, 5
KINDS = {
    "sd3": lambda: SD3(tiny_flow.tiny_sd3(), tiny_flow.shifted_vae(), tiny_flow.SHIFTED),
    "sd3.5": lambda: SD3(tiny_flow.tiny_sd3(dual=True), tiny_flow.shifted_vae(), tiny_flow.SHIFTED),
    "flux": lambda: Flux(tiny_flow.tiny_flux(), tiny_flow.shifted_vae(), tiny_flow.DYNAMIC, resolution=8),
    "flux-dev": lambda: Flux(tiny_flow.tiny_flux(True), tiny_flow.shifted_vae(), tiny_flow.DYNAMIC, resolution=8),
    "dit": lambda: DiT(tiny_flow.tiny_dit(), tiny_flow.tiny_vae(), {"beta_start": 0.0001, "beta_end": 0.02}),
}
T_HIGH = 400


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """(model in float64, x, condition)."""
    model = KINDS[request.param]()
    model.network.double()
    generator = torch.Generator().manual_seed(0)
    size = (8, 8) if request.param == "dit" else (6, 8)
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    if request.param == "dit":
        return model, x, torch.tensor([3, 7])
    return model, x, torch.randn(2, 1 + TOKENS, tiny_flow.TEXT, generator=generator, dtype=torch.float64)


def guided(guidance, case):
    """(eps, eps_weak) by a guided prediction with scale 1: eps_guided = 2 eps − eps_weak."""
    model, x, condition = case
    with torch.no_grad(), estimator(model, guidance) as estimate:
        strong, eps = estimate(x, T_HIGH, condition)
    return strong, 2 * strong.eps - eps


def state_of(network):
    return [
        (dict(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks), getattr(m, "processor", None))
        for m in network.modules()
    ]


def with_hooks(case, handles):
    model, x, condition = case
    with torch.no_grad():
        found = model.predict(x, T_HIGH, condition)
    for handle in handles:
        handle.remove()
    return found.eps


def layers_of(model):
    return [layer.short for layer in model.attention.values()]


def test_tpg(case):
    """The image tokens enter each chosen block in another order; the text's do not."""
    model, x, _ = case
    count = x.shape[-1] * x.shape[-2] // 4
    for chosen in (["b0"], ["b1"], [layer for layer in layers_of(model) if "." not in layer]):
        draw, handles = T.SeededDraw(3, T_HIGH), []
        for short in chosen:
            (path,) = (layer.path for layer in model.attention.values() if layer.short == short)
            block = model.network.get_submodule(path.rpartition(".")[0])
            order = draw("uniform", (1, count))[0].argsort()

            def reorder(module, args, kwargs, order=order):
                if args:
                    return (args[0][:, order], *args[1:]), kwargs
                return args, kwargs | {"hidden_states": kwargs["hidden_states"][:, order]}

            handles.append(block.register_forward_pre_hook(reorder, with_kwargs=True))
        expected = with_hooks(case, handles)
        strong, got = guided(TPG(1.0, chosen, noise=3), case)
        assert relative(got, expected) < 1e-5 and relative(expected, strong.eps) > 1e-3


@pytest.mark.parametrize("s, alpha", [(2.0, 1.0), (0.5, 0.0)])
def test_tsg(case, s, alpha):
    """Noise on every embedding of the time, on none of a guidance scale's, of the prompt's or of the class."""
    model = case[0]
    last = float(model.schedule.ts[-1])

    def noisy(module, args, output):
        n = T.SeededDraw(3, T_HIGH)("normal", (1, output.shape[1])).double()
        deviation = ((output - output.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / (output.shape[1] - 1)
        return output + s * (T_HIGH / last) ** alpha * deviation.sqrt() * n

    names = [name for name, _ in model.network.named_modules() if name.endswith(".timestep_embedder")]
    assert len(names) == (2 if isinstance(model, DiT) else 1)
    handles = [model.network.get_submodule(name).register_forward_hook(noisy) for name in names]
    expected = with_hooks(case, handles)
    strong, got = guided(TSG(1.0, s=s, alpha=alpha, noise=3), case)
    assert relative(got, expected) < 1e-5 and relative(expected, strong.eps) > 1e-3


@pytest.mark.parametrize("shift", [150, -60.5, 5000])
def test_tsg_at_another_time(case, shift):
    """The network is told another time, and nothing else: its output is still of T_HIGH's noise."""
    model, x, condition = case
    told = min(T_HIGH + shift, float(model.schedule.ts[-1]))
    with torch.no_grad():
        strong, other = model.predict(x, T_HIGH, condition), model.predict(x, told, condition)
    if isinstance(model, DiT):
        expected = other.eps  # the output of the network does not depend on the time
    else:
        sigma = T_HIGH / 1000
        expected = x + (1 - sigma) * (other.eps - other.x0)  # eps = x + alpha v
    _, got = guided(TSG(1.0, s=0, shift=shift), case)
    assert relative(got, expected) < 1e-5 and relative(expected, strong.eps) > 1e-3


def turned(x, cos, sin):
    pairs = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + pairs * sin


def maps_of(case, layer):
    """The layer's attention of image tokens among themselves (B, heads, n, n), from its input and its weights."""
    model, x, condition = case
    attn, seen = layer.module, []

    def see(module, args, kwargs):
        seen.append(kwargs | dict(zip(("hidden_states",), args, strict=False)))

    handle = attn.register_forward_pre_hook(see, with_kwargs=True)
    with_hooks(case, [handle])
    tokens, rotary = seen[0]["hidden_states"], seen[0].get("image_rotary_emb")
    image = slice(TOKENS, None) if "single" in layer.path else slice(None)
    norm = {n: getattr(attn, f"norm_{n}", None) or torch.nn.Identity() for n in "qk"}
    q, k = (
        norm[n](to(tokens[:, image]).unflatten(-1, (HEADS, -1))).transpose(1, 2)
        for n, to in (("q", attn.to_q), ("k", attn.to_k))
    )
    if rotary is not None:
        q, k = (turned(part, *(angle[TOKENS:].double() for angle in rotary)) for part in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


def blur_matrix(n, reach, sigma):
    """(n, n): a Gaussian blur with reflection."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    weights = {d: float(torch.exp(torch.tensor(-0.5 * (d / sigma) ** 2))) for d in range(-reach, reach + 1)}
    for i in range(n):
        for d, weight in weights.items():
            j = abs(i + d)
            matrix[i, 2 * (n - 1) - j if j >= n else j] += weight / sum(weights.values())
    return matrix


def test_sag(case):
    """x̄ is blurred where the image tokens get more attention from each other than `threshold`."""
    model, x, condition = case
    chosen = [(layer, heads) for layer in model.attention.values() for heads in (None, [1, 2])]
    for layer, heads in chosen:
        strong, _ = guided(None, case)
        received = maps_of(case, layer)[:, heads or slice(None)].mean(1).sum(1)
        values = received.flatten().sort().values
        threshold = float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())  # no value is near it
        grid = (x.shape[-2] // 2, x.shape[-1] // 2)
        mask = (received > threshold).view(2, 1, *grid).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert 0.2 < float(mask.double().mean()) < 0.8
        rows, columns = (blur_matrix(n, 2, 1.5) for n in x.shape[-2:])
        blurred = torch.einsum("ij,bcjk,lk->bcil", rows, strong.x0, columns)
        if isinstance(model, DiT):
            a = float(model.schedule.alphas_cumprod[T_HIGH])
            alpha, sigma = a**0.5, (1 - a) ** 0.5
        else:
            alpha, sigma = 1 - T_HIGH / 1000, T_HIGH / 1000
        degraded = alpha * torch.where(mask, blurred, strong.x0) + sigma * strong.eps
        with torch.no_grad():
            expected = model.predict(degraded, T_HIGH, condition).eps
        name = layer.short + (":1,2" if heads else "")
        _, got = guided(SAG(1.0, name, threshold=threshold, sigma=1.5, taps=5), case)
        assert relative(got, expected) < 1e-5 and relative(expected, strong.eps) > 1e-4, name


@pytest.mark.parametrize("make", [lambda: TPG(1.0, "b1"), lambda: TSG(1.0), lambda: SAG(1.0, "b1")])
@pytest.mark.parametrize("when", ["strong", "weak"])
def test_a_pass_that_fails_leaves_the_network_as_it_was(case, make, when):
    model, x, condition = case
    before, passes = state_of(model.network), []
    last = list(model.attention.values())[-1].module

    def fail(module, args, kwargs, output=None):
        passes.append(1)
        if len(passes) == (1 if when == "strong" else 2):
            raise KeyError("a failure within the network")

    handle = last.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(KeyError), estimator(model, make()) as estimate:
        estimate(x, T_HIGH, condition)
    handle.remove()
    assert state_of(model.network) == before
    with torch.no_grad():
        plain = model.predict(x, T_HIGH, condition).eps
    assert torch.equal(guided(None, case)[0].eps, plain)
