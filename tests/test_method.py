"""Methods: presets, what a caller changes, how they are written down."""

from dataclasses import replace

import pytest

import operators
import restore
from restore import method
from restore.guidance import CFG, PAG
from restore.method import Method, Situation, find_preset
from restore.paths import configs_dir

NONLINEAR = ("clipping", "nonlinear_blur", "phase_retrieval", "jpeg_rounding")


def find(backbone, task, operator, sampler=None, data=None, *, quality=None, **situation):
    return find_preset(Situation(backbone, operator, task, data=data, **situation), sampler, quality)


def test_published_presets():
    ffhq = find("adm-ffhq-256", "sr8", "super_resolution", "dps")
    assert ffhq.parameters == {"zeta": 1.0} and ffhq.guidance.terms[0].scale == 1.0 and "Table 7" in ffhq.source
    sd = find("sd-1.5", None, "motion_blur", kind="latents")
    assert sd.sampler == "psld" and sd.parameters == {"eta": 0.15, "gamma": 0.015}
    assert find("sd-1.5", None, "motion_blur", "psld", "imagenet").parameters == {"eta": 0.3, "gamma": 0.03}
    assert sd.override(guidance=None).parameters == sd.override(guidance=PAG(0.0, "m1")).parameters
    assert sd.override(guidance=None).parameters == {"eta": 1.0, "gamma": 0.1}
    assert sd.override().parameters == {"eta": 0.15, "gamma": 0.015} and sd.override().guidance == sd.guidance
    motion = find("adm-imagenet-256", None, "motion_blur", "dps")
    assert motion.override().parameters == {"zeta": 1.0} and motion.override(guidance=None).parameters == {"zeta": 0.6}
    assert find("someone's.pt", None, "inpainting", "dps").parameters == {"zeta": 0.5}
    daps = find("someone's.pt", "inpaint-random", "inpainting", "daps")
    assert daps.steps == 200 and daps.parameters["lr"] == 1e-4
    daps = find("sd-1.5", None, "inpainting", "daps", kind="latents")
    assert daps.parameters["latent_clamp"] == 1 and daps.parameters["lr"] == 1.11e-6 and daps.parameters["tau"] == 0.01
    for file in (configs_dir() / "method").glob("*.yaml"):
        assert all(entry["source"] for entry in method._presets()), file


@pytest.mark.parametrize(
    ("backbone", "steps", "ddim_eta", "layers"),
    [  # PAG (Ahn et al. 2024), App. A.1 and A.2
        ("adm-imagenet-256", 250, None, "input_blocks.14.1 input_blocks.16.1 input_blocks.17.1 middle_block.1"),
        ("adm-imagenet-256-cond", 250, None, "input_blocks.14.1"),
        ("sd-1.5", 50, 0.0, "mid_block.attentions.0.transformer_blocks.0.attn1"),
    ],
)
def test_samples_of_a_prior_have_settings_of_their_own(backbone, steps, ddim_eta, layers):
    """Restorations perturb other layers of the same networks (Tables 5 and 7)."""
    preset = method.find_generation(backbone)
    assert (preset.steps, preset.parameters) == (steps, {"ddim_eta": ddim_eta})
    assert list(preset.guidance.terms[0].layers) == layers.split() != method.find_pag_layers(backbone)
    assert method.find_generation(backbone, 25, 0.5) == replace(preset, steps=25, parameters={"ddim_eta": 0.5})
    assert method.find_generation(backbone, None, None).parameters == {"ddim_eta": None}


def test_what_a_caller_gives_counts():
    preset = find("sd-1.5", None, "motion_blur", "psld")
    changed = preset.override(steps="100", guidance=None, parameters={"eta": 0.3})
    assert changed.steps == 100 and changed.parameters == {"eta": 0.3, "gamma": 0.1} and changed.guidance is None
    assert preset.override(steps="ddim50").steps == "ddim50"
    for options, message in [
        ({"parameters": {"etta": 1}}, "did you mean 'eta'"),
        ({"guidance": "off"}, "guidance"),
        ({"guidance": {}}, "guidance"),
    ]:
        with pytest.raises(restore.RestoreError, match=message):
            preset.override(**options)
    with pytest.raises(restore.RestoreError, match="needs the parameter 'zeta'"):
        Method("dps", 10).override()


def test_a_method_is_read_back_from_its_description():
    for given in (
        Method("dps", 100, {"zeta": 1.0}, PAG(1.0, ["i9"]) + CFG(2.0), {}, "here"),
        Method("psld", "ddim50", {"eta": 1.0, "gamma": 0.1}, None, {"eta": 2.0}),
    ):
        assert Method.from_config(given.describe()) == given
    with pytest.raises(restore.RestoreError, match="did you mean 'steps'"):
        Method.from_config({"sampler": "dps", "step": 3})


def test_presets_of_a_task_come_before_those_of_its_operator(monkeypatch):
    """SR x4 and x8 can differ although their operator is the same."""
    entries = tuple(
        {"sampler": "dps", "backbone": "x", "task": task, "steps": steps, "parameters": {"zeta": 1.0}, "source": "here"}
        for task, steps in (("sr8", 8), (["sr4", "super_resolution"], 4), ("*", 1))
    )
    monkeypatch.setattr(method, "_presets", lambda: entries)
    found = [find("x", task, "super_resolution", "dps").steps for task in ("sr8", "sr4", None)]
    assert found == [8, 4, 4] and find("x", "blur", "gaussian_blur", "dps").steps == 1


def test_defaults_name_a_sampler_for_every_quality():
    """Without a sampler: DiffPIR for linear A in pixels, FAST-DIPS or DPS for others, PSLD on latents; no guidance."""
    for backbone in ("embedded", "someone's.pt"):
        found = {q: find(backbone, "sr4", "super_resolution", quality=q) for q in method.QUALITIES}
        assert [m.sampler for m in found.values()] == ["diffpir"] * 3 and not any(m.guidance for m in found.values())
        steps = [int(str(m.steps).removeprefix("quad:")) for m in found.values()]
        assert steps == sorted(steps) and steps[0] < steps[-1] <= 100
        assert find(backbone, "sr4", "super_resolution") == found["balanced"]
        other = {"linear": False, "sigma": None}
        assert find(backbone, None, "super_resolution", **other).sampler == "dps"
        nonlinear = [find(backbone, None, name, **other).sampler for name in NONLINEAR]
        assert nonlinear == ["fastdips" if backbone == "embedded" else "dps"] * len(NONLINEAR)
    assert find("sd-1.5", None, "inpainting", kind="latents", quality="fast").sampler == "psld"
    assert find("embedded", None, "inpainting", "dps").guidance.terms[0].scale == 1.0  # PAG, one word away
    with pytest.raises(restore.RestoreError, match="did you mean 'fast'"):
        find("embedded", None, "inpainting", quality="fsat")


def test_what_a_quality_changes_is_named_once():
    steps = [find("embedded-photo", "blur", "gaussian_blur", quality=q).steps for q in method.QUALITIES]
    views = [find("embedded-photo", None, "denoising", quality=q).parameters for q in method.QUALITIES]
    times = [find("embedded-photo", None, "inpainting", quality=q).steps for q in method.QUALITIES]
    assert steps == [4, 8, 16] and [len(each) for each in times] == [4, 8, 13]
    assert views == [{"lam": 0.23, "orientations": name} for name in ("one", "four", "all")]
    assert find("embedded", None, "blur", windows=True).parameters == {"lam": 0.15}  # null: the sampler's own


def test_the_best_larger_photo_and_several_versions_are_samples():
    """From a reconstruction with noise: few evaluations more, where DPIR has none to offer."""
    qualities = [find("embedded-photo", "sr4", "super_resolution", quality=q) for q in method.QUALITIES]
    starts = [(m.sampler, m.parameters.get("start_from")) for m in qualities]
    assert starts == [("dpir", None), ("dpir", None), ("diffpir", "measurement")]
    several = find("embedded-photo", None, "super_resolution", samples=3)
    assert (several.steps, several.parameters) == (qualities[-1].steps, qualities[-1].parameters)
    assert len(several.steps) == 20 and several.parameters["zeta"] == 0.6
    for operator in ("gaussian_blur", "compose", "denoising"):
        several = find("embedded-photo", None, operator, samples=3)
        assert several.sampler == "diffpir" and several.parameters["zeta"] == 1.0 and len(several.steps) == 16


def test_fastdips_at_the_noise_at_which_it_is_ahead():
    how = {"backbone": "embedded", "task": "motion-blur", "operator": "motion_blur"}
    chosen = [find(**how, quality="fast", sigma=sigma).sampler for sigma in (0.0, 0.01, 0.03)]
    assert chosen == ["diffpir", "diffpir", "fastdips"]
    assert find(**how, sigma=0.05).sampler == "diffpir" == find(**how, quality="fast").sampler
    operator = operators.MotionBlur(kernel_size=15, noise=operators.GaussianNoise(0.05))
    assert restore.load("embedded").method(operator, quality="fast").sampler == "fastdips"


def test_photos_in_windows_get_one_estimate_unless_samples_are_asked_for():
    how = {"backbone": "embedded", "task": "sr4", "operator": "super_resolution"}
    assert find(**how, windows=True).sampler == "dpir"
    assert find(**how).sampler == find(**how, windows=True, samples=2).sampler == "diffpir"
    assert find("embedded", "inpaint", "inpainting", windows=True).sampler == "diffpir"
    assert find("embedded", "denoise", "denoising", windows=True).steps == 1
    assert find("someone's.pt", "sr4", "super_resolution", windows=True).sampler == "diffpir"
