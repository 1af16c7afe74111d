"""Guidance from plain data and back, parts of a user's own module included; what is refused, and how."""

from __future__ import annotations

import json
from pathlib import Path

import own
import pytest
import torch
from omegaconf import OmegaConf

import restore
from operators import RestoreError
from restore.backbones.adm import ADM
from restore.guidance import (
    APG,
    CFG,
    PAG,
    Guidance,
    Rescale,
    as_guidance,
    build_guidance,
    describe_guidance,
    estimator,
    resolve_guidance,
)
from restore.guidance.combine import weighted_sum

GOLDEN = Path(__file__).parent.parent / "golden"
OWN = {
    "pag": "{scale: 1.5, layers: [m1], target: 'own:reversed_values', schedule: 'own:late'}",
    "own": "{name: 'own:Attended', scale: 2.0, by: 0.25}",
}


def test_a_mapping_and_a_list():
    pag = {"scale": 1.0, "layers": ["i9"], "strength": 0.5}
    assert build_guidance({"pag": pag, "cfg": {"scale": 2.0}}) == PAG(1.0, ["i9"], strength=0.5) + CFG(2.0)
    several = [{"pag": pag}, {"name": "pag", "scale": 3.0, "layers": "m1:0", "interval": [800, 200]}]
    assert build_guidance(several) == PAG(1.0, ["i9"], strength=0.5) + PAG(3.0, "m1:0", interval=(800, 200))
    assert build_guidance(None) is None and build_guidance({}) is None and build_guidance([]) is None
    assert build_guidance({"name": "cfg", "scale": 1}) == as_guidance(CFG(1))
    assert build_guidance({"cfg": {"scale": 1}, "combine": {"apg": {"eta": 0.5}}}).combine == APG(eta=0.5)
    assert build_guidance([{"cfg": {"scale": 1}}, {"combine": "rescale"}]).combine == Rescale()


@pytest.mark.parametrize(
    "guidance",
    [
        PAG(1.0, "i9"),
        PAG(1.0, ["i9", "m1:0,1"], heads=None, target="blur", strength=0.3, interval=(900, 100), noise=4),
        PAG(2, "i5,m1", heads={"i5": [0, 2], "m1": [1]}, schedule="cosine", scope="image"),
        CFG(2.0, schedule="own:late") + PAG(0.0, "m1", target="own:reversed_values"),
        Guidance((CFG(1.0),), APG(momentum=0.0, threshold=5.0)),
        Guidance((CFG(1.0), PAG(1.0, "m1")), {"rescale": {"phi": 0.2}}),
        Guidance((own.Attended(3.0, 0.1, interval=(900, 0)),), own.furthest),
    ],
)
def test_describe_is_the_inverse_of_build(guidance):
    text = json.dumps(describe_guidance(guidance))
    assert build_guidance(json.loads(text)) == as_guidance(guidance)
    assert describe_guidance(build_guidance(json.loads(text))) == describe_guidance(guidance)


def test_descriptions():
    assert describe_guidance(None) is None
    assert describe_guidance(PAG(1.0, "i9")) == [{"pag": {"scale": 1.0, "layers": "i9"}}]
    guidance = PAG(1.0, "i9", target=own.reversed_values, schedule=own.late)
    assert describe_guidance(guidance)[0]["pag"]["target"] == "own:reversed_values"
    assert build_guidance(describe_guidance(guidance)).terms != (guidance,)  # a name in place of the function
    one, other = (describe_guidance(CFG(1.0, null=torch.full((1, 2), value)))[0]["cfg"]["null"] for value in (0.0, 1.0))
    assert one.startswith("tensor (1, 2) float32 sha256 ") and one != other


def test_parts_of_a_users_module_act_from_yaml():
    """The same numbers as with the functions themselves, and as computed by hand."""
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16)
    text = f"[{{pag: {OWN['pag']}}}, {OWN['own']}, {{combine: 'own:furthest'}}]"
    configured = build_guidance(OmegaConf.to_container(OmegaConf.create(text)))
    pag = PAG(1.5, "m1", target=own.reversed_values, schedule=own.late)
    given = Guidance((pag, own.Attended(2.0, 0.25)), own.furthest)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in (700, 300):
        with torch.no_grad(), estimator(model, configured) as a, estimator(model, given) as b:
            strong, eps = a(x, t)
            assert torch.equal(eps, b(x, t)[1])
            weak = [term.eps(x, t, None, strong) for term in a.passes]
        scales = [3.0, 2.0] if t == 300 else [0.0, 2.0]
        assert a.evaluations == (3 if t == 300 else 2)
        options = [(s, w) for s, w in zip(scales, weak, strict=True) if s]
        assert torch.equal(eps, own.furthest(strong.eps, options)) and not torch.equal(eps, strong.eps)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"pagg": {}}, "unknown guidance 'pagg'; did you mean 'pag'"),
        (
            {"pag": {"scale": 1, "layers": "m1", "strenght": 1}},
            "guidance.pag has no option 'strenght'; did you mean 'str",
        ),
        ({"pag": {"layers": "m1"}}, "guidance.pag needs the option 'scale'"),
        ({"pag": {"scale": 1}}, "guidance.pag needs the option 'layers'"),
        ({"pag": None}, "guidance.pag needs the option 'scale'"),
        ({"pag": 3.0}, "guidance term must be a name"),
        ({"pag": {"scale": "a", "layers": "m1"}}, "finite number, got 'a'"),
        (
            {"pag": {"scale": 1, "layers": "m1", "schedule": "cosin"}},
            "unknown schedule of pag 'cosin'; did you mean 'cos",
        ),
        ({"pag": {"scale": 1, "layers": "m1", "scope": "text"}}, "unknown scope of pag 'text'; known: joint, image"),
        (
            {"pag": {"scale": 1, "layers": "m1", "target": "own:none"}},
            "'own:none' cannot be imported",
        ),
        ({"cfg": {"scale": 1, "interval": "all"}}, "interval of cfg must be .*, got 'all'"),
        ({"cfg": {"scale": 1}, "combine": "agp"}, "unknown combination 'agp'; did you mean 'apg'"),
        ({"cfg": {"scale": 1}, "combine": {"apg": {"nu": 1}}}, "combination apg has no option 'nu'"),
        (
            {"cfg": {"scale": 1}, "combine": {"rescale": {"phi": 2}}},
            r"phi of rescale must be a number in \[0, 1\], got 2",
        ),
        ({"cfg": {"scale": 1}, "combine": 3}, "combine must be a name, a mapping or a function, got 3"),
        ({"no_module_of_mine:x": {"scale": 1}}, "cannot be imported"),
        ("pag", "guidance must be a mapping"),
        (["pag"], "needs the option 'scale'"),
    ],
)
def test_mistakes(config, match):
    with pytest.raises(RestoreError, match=match) as error:
        build_guidance(config)
    assert "\n" not in str(error.value)


def test_the_guidance_argument():
    preset, other = as_guidance(PAG(1.0, "m1")), CFG(1.0)
    assert resolve_guidance(None, preset) is None and resolve_guidance("preset", preset) is preset
    assert resolve_guidance(other, preset) == Guidance((other,)) == as_guidance(as_guidance(other))
    assert resolve_guidance("preset", None) is None
    for value in ("none", "off", "pag", {}, {"pag": {"scale": 1.0}}, 3.0, False, PAG):
        with pytest.raises(restore.RestoreError, match='"preset"'):
            resolve_guidance(value, preset)


def test_sums_of_combinations():
    apg, rescale = Guidance((CFG(1.0),), "apg"), Guidance((CFG(2.0),), "rescale")
    assert (apg + PAG(1.0, "m1")).combine == APG() and (PAG(1.0, "m1") + apg).combine == APG()
    assert (apg + Guidance((CFG(3.0),), "apg")).combine == APG()
    assert (PAG(1.0, "m1") + CFG(1.0)).combine is weighted_sum
    with pytest.raises(RestoreError, match="one combination"):
        apg + rescale
    with pytest.raises(RestoreError, match="Term"):
        Guidance((PAG(1.0, "m1") + CFG(1.0),))
    with pytest.raises(RestoreError, match="Term"):
        build_guidance({"name": "fractions:Fraction", "numerator": 1})
