"""What all samplers promise: no sampler imports another, any can be deleted, arguments and reports have one form."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from golden_samplers import network

import operators
from operators import RestoreError
from restore import samplers
from restore.paths import configs_dir
from restore.samplers import steps
from restore.samplers.noise import ImageNoise

FOLDER = Path(samplers.__file__).parent
MODULES = {path.split(":")[0].rpartition(".")[2] for path in samplers.SAMPLERS.values()} | {"generate"}
SHARED = {"__init__", "consistency", "fill", "likelihood", "noise", "steps"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_of_the_folder_imports_a_sampler():
    assert {path.stem for path in FOLDER.glob("*.py")} == MODULES | SHARED
    for path in FOLDER.glob("*.py"):
        found = {name.rpartition(".")[2] for name in imported_modules(path) if name.startswith("restore.samplers.")}
        assert not found & MODULES - {path.stem}, path.name


RUN = """
import torch
import operators, restore
from restore import samplers
from restore.samplers.noise import ImageNoise
assert "flowdps" not in samplers.SAMPLERS and samplers.__file__.startswith(FOLDER)
y = torch.zeros(1, 3, 64, 64)
result = restore.load("embedded", device="cpu")(y, operators.Denoising(), sampler="ddrm", steps=1, guidance=None)
assert result.samples.shape == (1, 1, 3, 64, 64)
try:
    samplers.find_sampler("flowdps")
except restore.RestoreError as error:
    assert "sampler 'flowdps'" in str(error)
"""


def test_a_sampler_is_deleted_with_its_file_and_its_row(tmp_path):
    root = FOLDER.parents[1]
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("restore", "operators"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=ignored)
    for folder in ("configs", "data"):
        (tmp_path / folder).symlink_to(root / folder)
    (tmp_path / "restore" / "samplers" / "flowdps.py").unlink()
    table = tmp_path / "restore" / "samplers" / "__init__.py"
    rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if '"flowdps"' not in row]
    assert len(kept) == len(rows) - 1
    table.write_text("".join(kept), encoding="utf-8")
    script = f"FOLDER = {str(tmp_path)!r}\n{RUN}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_takes_the_arguments_of_the_contract(name):
    function = samplers.find_sampler(name)
    assert samplers.sampler_name(function) == name and samplers.find_sampler(function) is function
    parameters = inspect.signature(function).parameters
    contract = ["prior", "operator", "y", "noise", "steps", "guidance", "condition", "callback"]
    assert list(parameters)[:8] == contract
    assert all(parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in list(parameters)[3:])
    assert all(parameters[key].default is None for key in contract[5:])
    # The command line checks a setting against its annotation.
    assert all(item.annotation is not item.empty for item in samplers.sampler_parameters(name).values())
    # A person reads what is special to the sampler, not what the contract says.
    assert "`restore.samplers`" in function.__doc__


def test_names_that_do_not_exist():
    for name in ("dsp", "nowhere:dps", 3, ["dps"]):
        with pytest.raises(RestoreError, match="sampler"):
            samplers.find_sampler(name)
    with pytest.raises(RestoreError, match="'eat'.*eta"):
        samplers.check_parameters("ddrm", {"eat": 1})
    with pytest.raises(RestoreError, match="'zeta'"):
        samplers.check_parameters("dps", {})
    samplers.check_parameters("dps", {}, complete=False)


@pytest.mark.parametrize("path", sorted((configs_dir() / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_reference_blocks_hold_what_is_read(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    block = config.get("reference", {})
    assert set(block) <= {"parameters", "adjoint"}
    if block:
        samplers.check_parameters(config["sampler"], block["parameters"], complete=False)
        if "adjoint" in block:
            operators.SuperResolution(4).with_adjoint(block["adjoint"])


def test_starts():
    """A start is the same reconstruction in every sampler that has it; RED-diff takes its older name too."""
    prior, operator = network(double=False), operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y = operator.A(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    expected = {"dagger": operator.A_dagger(y), "adjoint": operator.A_adjoint(y), "zero": torch.zeros(1, 3, 32, 32)}
    for name, image in expected.items():
        assert torch.equal(steps.reconstruct(name, prior, operator, y, 0.05), image)
    assert not torch.equal(steps.reconstruct("measurement", prior, operator, y, 0.05), expected["dagger"])
    n = torch.ones(1, 3, 32, 32)
    assert steps.initialise("noise", prior, operator, y, 0.05, (999, 0.1, 0.9), n) is n
    assert torch.equal(steps.initialise("zero", prior, operator, y, 0.05, (999, 0.1, 0.9), n), 0.9 * n)
    with pytest.raises(RestoreError, match="start_from 'noise'"):
        steps.reconstruct("noise", prior, operator, y, 0.05)
    reddiff = samplers.find_sampler("reddiff")
    given = {"noise": ImageNoise([(0, "x", 0)]), "steps": 2}
    options = ({"start_from": "adjoint"}, {"start": "adjoint"}, {})
    runs = [reddiff(prior, operator, y, **given, **own) for own in options]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(reddiff(prior, operator, y, **given, start_from="dagger", start="zero"), runs[2])


def test_report():
    seen, x = [], torch.ones(2, 1, requires_grad=True)
    steps.report(None, 0, 3, 5, x_t=x)
    steps.report(seen.append, 1, 3, 5, x_t=x, x0_hat=x, residual=x, own="a")
    assert {key: seen[0][key] for key in ("step", "steps", "t", "own")} == {"step": 1, "steps": 3, "t": 5, "own": "a"}
    assert not any(seen[0][key].requires_grad for key in ("x_t", "x0_hat", "residual"))
    image = torch.zeros(2, 3, 4, 4)
    steps.report(seen.append, 1, 3, 5, x0_hat=image, operator=operators.Denoising(), y=image + 1)
    assert torch.allclose(seen[1]["residual"], torch.full((2,), 48.0).sqrt())
    assert set(seen[1]) == {"step", "steps", "t", "x0_hat", "residual"}
