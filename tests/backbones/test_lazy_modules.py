"""What a small photo does not use is not imported, and everybody else's imports stay what they are."""

import subprocess
import sys
from pathlib import Path

import pytest

from restore.backbones.lazy_modules import defer_decorator, import_lazily

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch._dynamo",
    "sympy",
    "torchvision",
    "kornia",
    "scipy.stats",
    "diffusers.loaders.lora_base",
    "diffusers.models.unets.unet_2d_condition",
)
PROGRAM = f"""
import sys
import torch
import restore
from restore.app.run import RestoreJob
from restore.memory import Planner
from restore.task import load_task

restorer, task = restore.load("embedded", device="cpu"), load_task("denoise")
operator = task.build(64, 64)
method = restorer.method(operator, task="denoise", steps=2)
assert Planner(restorer).plan(task, (64, 64), method).fits
restorer(torch.zeros(1, 3, 64, 64), operator, method)
assert not (early := [name for name in {HEAVY!r} if name in sys.modules]), early
restore.load("embedded-latent", device="cpu")

import diffusers
import diffusers.models.unets
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
assert type(restorer.backbone.network) is UNet2DModel is diffusers.models.unets.UNet2DModel
assert diffusers.models.unets.unet_2d.UNet2DModel is UNet2DModel
assert "unet_3d_condition" in dir(diffusers.models.unets)
import torch._dynamo.utils
from torch._dynamo import trace_rules, variables
from diffusers.models.attention_processor import Attention
assert trace_rules.lookup_callable(Attention) is variables.TorchInGraphFunctionVariable
assert torch._dynamo is sys.modules["torch._dynamo"]
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("restore")]
"""


def test_a_small_photo_imports_little_and_later_imports_are_whole():
    """And nothing is printed when a model is loaded, of pixels or of latents."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """heavy/: its __init__ imports `one` and `two`, and counts in heavy.count; marks/: a decorator."""
    for name, files in {
        "heavy_lib": {
            "__init__.py": "import builtins\nbuiltins.heavy_runs = 1\nfrom .one import A\nfrom .two import B\n",
            "one.py": "import marks_lib\nfrom marks_lib import mark\n@mark\nclass A: ...\n",
            "two.py": "from .one import A\nclass B(A): ...\n",
        },
        "marks_lib": {"__init__.py": "marked = []\ndef mark(c):\n    marked.append(c)\n    return c\n", "more.py": ""},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before
    for name in [name for name in sys.modules if name.partition(".")[0] in ("heavy_lib", "marks_lib")]:
        del sys.modules[name]


def test_a_package_runs_when_it_is_asked_for_more(library):
    with defer_decorator("marks_lib", "mark"), import_lazily(["heavy_lib", "heavy_lib.absent"]):
        from heavy_lib.one import A
    assert "heavy_lib.two" not in sys.modules and "marks_lib" not in sys.modules
    import heavy_lib

    assert heavy_lib.one.A is A
    assert issubclass(heavy_lib.B, A) and "heavy_lib.two" in sys.modules
    assert sys.modules["heavy_lib"].one.A is A and sys.modules["heavy_lib"].A is A
    with pytest.raises(AttributeError, match="nothing"):
        heavy_lib.nothing  # noqa: B018
    import marks_lib.more

    assert marks_lib.marked == [A]


def test_what_is_imported_already_stays(library):
    import heavy_lib
    import marks_lib

    with defer_decorator("marks_lib", "mark"), import_lazily(["heavy_lib"]):
        import heavy_lib.one
    assert sys.modules["heavy_lib"] is heavy_lib and type(heavy_lib).__name__ == "module"
    assert marks_lib.marked == [heavy_lib.A]
