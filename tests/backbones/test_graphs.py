"""Compiled networks: what is recorded, what runs uncompiled, and when graphs are dropped."""

from __future__ import annotations

import pytest
import tiny_sd
import torch
from tiny_adm import tiny_adm

import operators
import restore
from operators import RestoreError
from restore.backbones.graphs import compile_networks, find_graphs
from restore.backbones.memory_options import enable_block_checkpointing
from restore.guidance import CFG, PAG, SAG, estimator
from restore.memory.count import LiveBytes


def halve(a):
    return a.v / 2


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def evaluate(model, guidance=None, gradient=False, condition=None):
    """Strong eps, guided eps and gradient at four times."""
    found = []
    with torch.set_grad_enabled(gradient), estimator(model, guidance) as estimate:
        for t in (600, 500, 400, 300):
            x = X.clone().requires_grad_(gradient)
            strong = estimate.strong(x, t, condition)
            found += list(torch.autograd.grad(strong.eps.square().sum(), x)) if gradient else []
            found += [strong.eps.detach(), estimate.guided(strong, x, t, condition)]
    return torch.stack(found)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model: (compile_networks(model, backend="eager"), model)[1]
    torch._dynamo.reset()


def test_modes_are_checked_and_a_network_is_compiled_once():
    with pytest.raises(RestoreError, match="unknown mode of torch.compile.*fast"):
        compile_networks(tiny_adm(), "fast")
    model = tiny_adm()
    compile_networks(model)
    with pytest.raises(RestoreError, match="compiled already"):
        compile_networks(model)


def test_many_sizes_are_compiled(compiled):
    """torch compiles eight versions of one code object, and refuses the ninth."""
    plain, model = tiny_adm(), compiled(tiny_adm())
    with torch.no_grad():
        for n in range(1, 11):
            x = X[:1].expand(n, -1, -1, -1)
            assert torch.allclose(model.predict(x, 500).eps, plain.predict(x, 500).eps, atol=1e-5)
    assert find_graphs(model.network).count == 10


def test_what_needs_the_networks_own_code_runs_it():
    """Fake tensors and counters of memory, recomputed blocks, inference tensors, replaced parts of the network: nothing
    is compiled, and nothing else is computed."""
    plain, model = tiny_adm(), tiny_adm()
    graphs = compile_networks(model, backend="a backend that does not exist")
    with LiveBytes(), torch.no_grad():
        assert torch.equal(model.predict(X, 500).eps, plain.predict(X, 500).eps)
    with torch.inference_mode():
        assert torch.equal(model.predict(X, 500).eps, plain.predict(X, 500).eps)
    enable_block_checkpointing(model)
    assert torch.equal(evaluate(model, gradient=True), evaluate(plain, gradient=True))
    assert graphs.count == 0


def test_a_compiler_that_fails_is_one_sentence():
    model = tiny_adm()

    def broken(graph, inputs):
        raise RuntimeError("no working C++ compiler\nlong explanation")

    torch._dynamo.reset()
    compile_networks(model, backend=broken)
    with pytest.raises(RestoreError, match="torch.compile fails, got: .*no working C\\+\\+ compiler$"):
        model.predict(X, 500)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "graphs"),
    [
        (PAG(2.0, "m1", target="noise"), 1),  # draws: the strong pass alone
        (PAG(2.0, "m1", target=halve), 1),  # of the user's, which may do anything
        (SAG(1.0, "m1"), 1),  # watches the strong pass
        (CFG(1.0), 1),  # the same pass, of another input
    ],
    ids=["noise", "own", "SAG", "CFG"],
)
def test_guidances_whose_passes_cannot_all_be_kept(compiled, guidance, graphs):
    options = {"num_class_embeds": 4} if isinstance(guidance, CFG) else {}
    condition = torch.tensor([0, 1]) if options else None
    plain, model = tiny_adm(**options), compiled(tiny_adm(**options))
    for _ in range(2):
        expected = evaluate(plain, guidance, False, condition)
        assert torch.allclose(evaluate(model, guidance, False, condition), expected, rtol=1e-4, atol=1e-5)
    assert find_graphs(model.network).count == graphs


@pytest.mark.slow
def test_weights_and_settings_may_change_between_runs(compiled):
    plain, model, guidance = tiny_adm(), compiled(tiny_adm()), PAG(2.0, "m1")
    evaluate(model, guidance)
    for network in (plain.network, model.network):
        torch.manual_seed(1)
        for parameter in network.parameters():  # in place: the graphs hold the same weights
            parameter.copy_(0.1 * torch.randn_like(parameter))
    kept = find_graphs(model.network).count
    assert torch.allclose(evaluate(model, guidance), evaluate(plain, guidance), atol=1e-5)
    assert find_graphs(model.network).count == kept
    for network in (plain.network, model.network):
        network.mid_block.resnets[0].conv1.weight = torch.nn.Parameter(torch.zeros(16, 16, 3, 3), requires_grad=False)
        network.up_blocks[0].resnets[0].output_scale_factor = 2.0
    assert torch.allclose(evaluate(model, guidance), evaluate(plain, guidance), atol=1e-5)


@pytest.mark.slow
def test_low_precision_is_recorded_with_its_casts(compiled):
    """bf16 by autocast: the state stays fp32, and what a target computes in fp32 does."""
    guidance = PAG(2.0, "m1", target={"seg": {"sigma": 2.0}})
    plain, model = tiny_adm("bf16"), compiled(tiny_adm("bf16"))
    expected, got = evaluate(plain, guidance, True), evaluate(model, guidance, True)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, rtol=0.02, atol=0.02)
    assert not torch.allclose(expected, evaluate(tiny_adm(), guidance, True), atol=1e-4)


@pytest.mark.slow
def test_latents_and_windows(tmp_path, compiled):
    """Stable Diffusion beyond its resolution: U-Net in windows, encoder and decoder, PSLD's gradient through all."""
    folder = tiny_sd.save_folder(tmp_path)
    restorers = [restore.load(folder, device="cpu") for _ in range(2)]
    compiled(restorers[1])
    side = restorers[0].backbone.resolution * restorers[0].backbone.downscale
    A = operators.SuperResolution(2, noise=operators.GaussianNoise(0.05))
    generator = torch.Generator().manual_seed(0)
    y = A(torch.rand(1, 3, side, side + 16, generator=generator) * 2 - 1, generator)
    options = {"sampler": "psld", "steps": 3, "eta": 0.1, "gamma": 0.1, "guidance": PAG(1.0, "m1")}
    a, b = (restorer(y, A, **options) for restorer in restorers)
    assert torch.allclose(a.samples, b.samples, atol=1e-3)
    assert find_graphs(restorers[1].backbone.vae.decoder).count >= 4
    assert b.protocol["compiled"] == "default" and "compiled" not in a.protocol
