"""operators.build_operator, and the task files of configs/task."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import operators

TASKS = Path(__file__).parents[2] / "configs" / "task"
NAMES = ["sr8", "sr4", "inpaint-box", "inpaint-random", "gaussian-blur", "motion-blur", "denoise", "colorize"]
NONLINEAR = {
    "hdr": operators.Clipping,
    "phase-retrieval": operators.PhaseRetrieval,
    "nonlinear-blur": operators.NonlinearBlur,
    "jpeg-rounding": operators.JPEGRounding,
}


@pytest.mark.parametrize("size", [64, (256, 256), (67, 90)], ids=str)
@pytest.mark.parametrize("task", NAMES)
def test_task_files(task, size):
    operator = operators.build_operator(OmegaConf.load(TASKS / f"{task}.yaml"), image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert operator.noise.sigma == 0.05 and operator.image_size == (height, width)
    assert operators.check_operator(operator, (1, 3, height, width)) <= 1e-10


@pytest.mark.parametrize("task", NONLINEAR)
def test_task_files_of_nonlinear_operators(task):
    size = (40, 48) if task == "nonlinear-blur" else (16, 24)  # above its kernel's radius
    operator = operators.build_operator(OmegaConf.load(TASKS / f"{task}.yaml"), image_size=size)
    assert type(operator) is NONLINEAR[task] and not operator.linear
    assert getattr(operator.noise, "sigma", None) == (None if task == "jpeg-rounding" else 0.05)
    x = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
    if task == "hdr":
        assert torch.equal(operator.A(x), (2 * x).clamp(-1, 1))
    elif task == "nonlinear-blur":
        assert (operator.kernel_size, operator.intensity, operator.seed) == (61, 0.5, 0)
    elif task == "jpeg-rounding":
        assert torch.equal(operator.A(x), operators.JPEGNoise(10)(x))
    else:
        assert operator.A(x).shape == (1, 3, 16 + 2 * 4, 24 + 2 * 6)  # a quarter of a side at each border


def test_tasks_that_need_something_from_the_user():
    assert {path.stem for path in TASKS.glob("*.yaml")} == {*NAMES, *NONLINEAR, "inpaint", "blur", "jpeg"}
    for task, option, value in [
        ("inpaint", "mask", operators.box_mask(32)),
        ("blur", "kernel", operators.gaussian_kernel(5, 1.0)),
    ]:
        mapping = dict(OmegaConf.load(TASKS / f"{task}.yaml"))
        with pytest.raises(operators.RestoreError, match=f"needs the option '{option}'"):
            operators.build_operator(mapping, image_size=32)
        assert operators.build_operator({**mapping, option: value}, image_size=32).noise.sigma == 0.05


def test_the_defaults_are_those_of_dps():
    blur, motion = (
        operators.build_operator({"name": "gaussian_blur"}),
        operators.build_operator({"name": "motion_blur"}),
    )
    assert (blur.kernel_size, blur.std, motion.kernel_size, motion.intensity) == (61, 3.0, 61, 0.5)
    mask = operators.build_operator(OmegaConf.load(TASKS / "inpaint-box.yaml"), image_size=256).mask
    assert (mask == 0).sum() == 128**2


def test_build_equals_the_constructors():
    x = torch.rand(2, 3, 40, 48)
    pairs = [
        ({"name": "super_resolution", "factor": 8}, operators.SuperResolution(8)),
        ({"name": "gaussian_blur", "kernel_size": 9, "std": 1.2}, operators.GaussianBlur(9, 1.2)),
        ({"name": "motion_blur", "kernel_size": 15, "intensity": 0.2, "seed": 4}, operators.MotionBlur(15, 0.2, 4)),
        ({"name": "inpainting_random", "seed": 2}, operators.Inpainting(operators.random_mask((40, 48), seed=2))),
        ({"name": "inpainting_box", "size": [9, 8]}, operators.Inpainting(operators.box_mask((40, 48), size=(9, 8)))),
        ({"name": "denoising"}, operators.Denoising()),
    ]
    for mapping, operator in pairs:
        built = operators.build_operator(mapping, image_size=(40, 48))
        assert torch.equal(built.A(x), operator.A(x)) and built.noise is None
        assert torch.equal(operators.build_operator({**mapping, "image_size": [40, 48]}).A(x), operator.A(x))


def test_other_spellings_of_a_name():
    assert isinstance(operators.build_operator({"name": "gaussian-blur"}), operators.GaussianBlur)
    mask = operators.box_mask(8)
    assert operators.build_operator({"name": "inpainting", "mask": mask}).name == "inpainting"
    assert operators.operator_options("inpainting") == operators.operator_options("inpainting-mask") == ["mask"]
    with pytest.raises(operators.RestoreError, match="unknown operator 'gauss-blur'; did you mean 'gaussian_blur'"):
        operators.build_operator({"name": "gauss-blur"})


def test_noise():
    def noise(mapping):
        return operators.build_operator({"name": "denoising", "noise": mapping}).noise

    assert noise({"name": "gaussian", "sigma": 0.1}).sigma == 0.1
    assert (noise({"name": "poisson", "rate": 2.0, "clip": False}).rate, noise({"name": "poisson"}).rate) == (2.0, 1.0)
    assert noise({"name": "none"}) is None and noise(None) is None
    model = operators.GaussianNoise(0.2)
    assert noise(model) is model


def test_compose_passes_the_size_on():
    stages = [{"name": "super_resolution", "factor": 2}, {"name": "inpainting_random"}, {"name": "colorization"}]
    mapping = {"name": "compose", "operators": stages, "noise": {"name": "gaussian", "sigma": 0.05}}
    operator = operators.build_operator(OmegaConf.create(mapping), image_size=(33, 47))
    y = operator(torch.rand(2, 3, 33, 47))
    assert y.shape == (2, 1, 17, 24) and operator.A_adjoint(y).shape == (2, 3, 33, 47)
    assert operator.noise.sigma == 0.05
    stages[-1]["noise"] = {"name": "poisson"}
    assert isinstance(
        operators.build_operator({"name": "compose", "operators": stages}, image_size=32).noise, operators.PoissonNoise
    )


def test_mistakes():
    cases = [
        (
            {"name": "super_resolutoin", "factor": 4},
            "unknown operator 'super_resolutoin'; did you mean 'super_resolution'",
        ),
        ({"name": "xyz"}, "unknown operator 'xyz'; known: .*denoising"),
        ({"name": "gaussian_blur", "sdt": 3.0}, "gaussian_blur has no option 'sdt'; did you mean 'std'"),
        ({"name": "super_resolution"}, "super_resolution needs the option 'factor'"),
        ({"name": "inpainting_box"}, "inpainting_box needs the option 'image_size'"),
        (
            {"name": "denoising", "noise": {"name": "gausian", "sigma": 0.05}},
            "unknown noise 'gausian'; did you mean 'gaussian'",
        ),
        ({"name": "denoising", "noise": {"name": "gaussian", "sgma": 0.05}}, "no option 'sgma'; did you mean 'sigma'"),
        ({"name": "denoising", "noise": {"name": "gaussian"}}, "gaussian needs the option 'sigma'"),
        ({"name": "denoising", "noise": {"name": "none", "sigma": 0.1}}, "none has no option 'sigma'"),
        ({"name": "denoising", "noise": 0.05}, "noise must be a mapping with a 'name'"),
        ({"factor": 4}, "operator must be a mapping with a 'name'"),
        ("denoising", "operator must be a mapping with a 'name'"),
        ({"name": "compose", "operators": []}, "list of operator mappings"),
        ({"name": "compose", "operators": "denoising"}, "list of operator mappings"),
        ({"name": "compose"}, "needs the option 'operators'"),
        ({"name": "denoising", "image_size": -3}, "image_size"),
        ({"name": ["a"]}, "unknown operator"),
    ]
    for mapping, message in cases:
        with pytest.raises(operators.RestoreError, match=message) as raised:
            operators.build_operator(mapping)
        assert "\n" not in str(raised.value)


def test_operators_do_not_import_restore():
    for path in (Path(operators.__file__).parent).glob("*.py"):
        assert "import restore" not in path.read_text() and "from restore" not in path.read_text()


class Mirror(operators.Operator):
    """A user's operator, written in a file of the user's."""

    name = "mirror"

    def __init__(self, gain=1.0, *, noise=None, image_size=None):
        super().__init__(noise=noise, image_size=image_size)
        self.gain = gain

    def A(self, x):
        return self.gain * x.flip(3)


class Half:
    """An operator of another library, without noise and image_size."""

    def __init__(self, factor):
        self.factor = factor

    def A(self, x):
        return self.factor * x

    A_adjoint = A


def twice(**options):
    return Mirror(2.0, **options)


not_a_maker = 3


@pytest.fixture
def module(monkeypatch):
    import sys
    import types

    mine = types.ModuleType("my_operators")
    mine.Mirror, mine.Half, mine.twice, mine.not_a_maker, mine.instance = Mirror, Half, twice, not_a_maker, Mirror()
    monkeypatch.setitem(sys.modules, "my_operators", mine)
    return "my_operators"


def test_a_users_operator_from_yaml(module, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"name: {module}:Mirror\ngain: 3.0\nnoise: {{name: gaussian, sigma: 0.05}}\nimage_size: [5, 6]\n"
    )
    x = torch.rand(1, 3, 5, 6)
    operator = operators.build_operator(OmegaConf.load(tmp_path / "mine.yaml"))
    assert isinstance(operator, Mirror) and operator.noise.sigma == 0.05 and operator.image_size == (5, 6)
    assert torch.equal(operator.A(x), 3 * x.flip(3)) and operators.operator_options(f"{module}:Mirror") == ["gain"]
    half = operators.build_operator(
        {"name": f"{module}:Half", "factor": 0.5, "noise": {"name": "gaussian", "sigma": 0.1}}, image_size=9
    )
    assert torch.equal(half.A(x), 0.5 * x) and half.noise.sigma == 0.1
    doubled = operators.build_operator({"name": f"{module}:twice", "noise": {"name": "gaussian", "sigma": 0.1}})
    assert torch.equal(doubled.A(x), 2 * x.flip(3)) and doubled.noise.sigma == 0.1
    chain = operators.build_operator(
        {"name": "compose", "operators": [{"name": f"{module}:Mirror"}, {"name": "denoising"}]}, image_size=(5, 6)
    )
    assert torch.equal(chain.A(x), x.flip(3))
    for mapping, message in [
        ({"name": f"{module}:Mirror", "gian": 2}, "has no option 'gian'; did you mean 'gain'"),
        ({"name": f"{module}:Half"}, "needs the option 'factor'"),
        ({"name": f"{module}:Miror"}, "cannot be imported"),
        ({"name": "my_operator:Mirror"}, "cannot be imported"),
        ({"name": f"{module}:not_a_maker"}, "must be a class or function that makes an operator"),
        ({"name": f"{module}:instance"}, "must be a class or function that makes an operator"),
        ({"name": "colorization", "adjoint": "reference"}, "adjoint must be .* colorization"),
    ]:
        with pytest.raises(operators.RestoreError, match=message):
            operators.build_operator(mapping)


def test_every_operator_lists_its_options():
    """The options are read from the signatures."""
    expected = {
        "inpainting_box": ["size", "margin", "top", "left", "seed"],
        "inpainting_random": ["fraction", "seed"],
        "inpainting_mask": ["mask"],
        "super_resolution": ["factor", "method"],
        "gaussian_blur": ["kernel_size", "std", "border"],
        "motion_blur": ["kernel_size", "intensity", "seed", "law", "border"],
        "blur": ["kernel", "normalize", "border"],
        "denoising": [],
        "colorization": ["weights"],
        "clipping": ["gain"],
        "phase_retrieval": ["oversample", "unit"],
        "jpeg_rounding": ["quality", "subsampling"],
        "nonlinear_blur": ["kernel_size", "intensity", "seed", "law", "border"],
        "jpeg": ["quality", "tables", "subsampling", "offset", "loss"],
        "compose": ["operators"],
    }
    assert {name: operators.operator_options(name) for name in operators.factory.OPERATORS} == expected
    with pytest.raises(operators.RestoreError, match="did you mean 'blur'"):
        operators.operator_options("blurr")
