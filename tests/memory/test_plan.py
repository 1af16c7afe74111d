"""Memory and time of a photo before it is restored, and how it is kept within the memory there is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_sd
import torch
from PIL import Image

import restore
from operators import RestoreError
from restore import PAG
from restore.app import cli
from restore.app.choice import MethodChoice
from restore.app.files import find_photos
from restore.app.run import RestoreJob
from restore.memory import Planner, available, measure, plan
from restore.memory.count import LiveBytes
from restore.task import load_task

GUIDED = PAG(1.0, layers="m1")
SIZE = (40, 56)  # of 16-pixel windows: 4 x 6


@pytest.fixture(scope="module")
def small(tiny_adm):
    return restore.load(tiny_adm, device="cpu")


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return restore.load(tiny_sd.save_folder(tmp_path_factory.mktemp("sd")), device="cpu")


def make_plan(restorer, task, size=SIZE, memory=None, samples=1, batch_size=1, **choices):
    task = load_task(task)
    method = restorer.method(task.build(*size), task=task.name, **choices)
    planner = Planner(restorer, memory)
    return planner, planner.plan(task, size, method, samples=samples, batch_size=batch_size)


def prepare_run(restorer, task, size=SIZE, **options):
    operator = load_task(task).build(*size)
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = operator(x, torch.Generator().manual_seed(1))
    parameters = options.pop("parameters", {})
    return lambda: restorer(y, operator, task=task, **options, **parameters)


CASES = [
    ("dps", "denoise", {"steps": 3, "guidance": None}),
    ("dps", "gaussian-blur", {"steps": 3, "guidance": PAG(1.0, layers="m1", every=2)}),
    ("diffpir", "sr4", {"steps": "quad:3", "guidance": None}),
    ("diffpir", "gaussian-blur", {"steps": "quad:3", "guidance": GUIDED}),
    ("ddrm", "sr4", {"steps": 3}),
    ("ddnm", "inpaint-box", {"steps": 3}),
    ("pigdm", "denoise", {"steps": 3}),
    ("daps", "sr4", {"steps": 3}),
    ("reddiff", "denoise", {"steps": 3}),
    ("pnpdm", "denoise", {"steps": 3, "parameters": {"iterations": 2}}),
]


@pytest.mark.parametrize(
    "case, checkpointing", [(case, False) for case in CASES] + [(case, True) for case in CASES[:4]]
)
def test_memory_and_evaluations_are_what_a_run_takes(tiny_adm, case, checkpointing):
    sampler, task, options = case
    restorer = restore.load(tiny_adm, device="cpu", checkpointing=checkpointing, max_windows=6)
    _, found = make_plan(restorer, task, sampler=sampler, **options)
    run = prepare_run(restorer, task, sampler=sampler, **options)
    with LiveBytes(known=[*restorer.backbone.network.parameters()]) as live:
        result = run()
    assert found.evaluations == result.nfe and found.windows == 24 and found.size == SIZE
    counted = (found.memory - plan.FIXED) / live.peak
    assert 1 < counted < 2, counted


@pytest.mark.parametrize(
    ("sampler", "parameters"), [("psld", {}), ("resample", {"pixel_iterations": 3, "latent_iterations": 3})]
)
def test_memory_and_evaluations_in_latents(latent, sampler, parameters):
    task, size = "denoise", (40, 40)
    options = {"sampler": sampler, "steps": 4, "guidance": None, "parameters": parameters}
    _, found = make_plan(latent, task, size, **options)
    run = prepare_run(latent, task, size, **options)
    with LiveBytes(known=[*latent.backbone.network.parameters(), *latent.backbone.vae.parameters()]) as live:
        result = run()
    assert found.evaluations == result.nfe
    assert 1 < (found.memory - plan.FIXED) / live.peak < 2.5


def test_a_photo_that_grew_to_twenty_gigabytes(monkeypatch):
    """1200 x 800, denoising, 2 steps of DPS on the embedded prior: 20 GB, and the kernel ended the server."""
    restorer, options = restore.load("embedded", device="cpu"), {"sampler": "dps", "steps": 2, "guidance": None}
    monkeypatch.setattr(Planner, "_seconds", lambda *_: 1.0)
    planner, found = make_plan(restorer, "denoise", (800, 1200), memory=64e9, **options)
    assert found.windows == 888 and not found.options.recompute_windows and 18e9 < found.memory < 60e9
    planner, found = make_plan(restorer, "denoise", (800, 1200), memory=2e9, **options)
    assert found.options.recompute_windows and found.options.max_windows == 16
    assert found.memory < 2e9 and found.fits
    with planner.apply(found) as limited:
        assert limited.windows["recompute_windows"] and not restorer.windows["recompute_windows"]


@pytest.mark.parametrize("guidance", [None, GUIDED])
def test_what_memory_forces_first_leaves_the_bytes_as_they_are(small, guidance):
    options = {"sampler": "dps", "steps": 3, "guidance": guidance}
    _, free = make_plan(small, "denoise", memory=1e12, **options)
    assert not free.checkpointing
    planner, found = make_plan(small, "denoise", memory=free.memory - 1, **options)
    assert found.options.recompute_windows and found.options.max_windows == 16 and found.memory < free.memory
    plain = prepare_run(small, "denoise", **options)().samples
    with planner.apply(found) as limited:
        assert torch.equal(prepare_run(limited, "denoise", **options)().samples, plain)
    planner, found = make_plan(small, "denoise", memory=found.memory - 1, **options)
    assert found.options.checkpoint_units and found.memory < free.memory
    with planner.apply(found) as limited:
        assert torch.equal(prepare_run(limited, "denoise", **options)().samples, plain)
    assert torch.equal(prepare_run(small, "denoise", **options)().samples, plain)


def test_a_photo_that_does_not_fit_is_refused_unless_forced(small, tmp_path):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "a.png")
    photos = find_photos([tmp_path / "a.png"], tmp_path / "out")
    task, method = load_task("denoise"), MethodChoice("dps", steps=2, guidance=None)
    planner, announced = Planner(small, 1e6), []
    (refused,) = RestoreJob(small, task, method, planner=planner, announce=announced.append).run(photos)
    assert "a.png would take 0.1 GB" in refused.error and "0.0 GB are free" in refused.error and len(announced) == 1
    assert not any((tmp_path / "out").iterdir())
    (outcome,) = RestoreJob(small, task, method, planner=planner, force=True).run(photos)
    assert outcome.error is None
    sidecar = json.loads(photos[0].sidecar.read_text())
    assert sidecar["estimate"]["max_windows"] == sidecar["protocol"]["windows"]["max_windows"] == 1
    assert sidecar["estimate"]["seconds"] is None and sidecar["estimate"]["evaluations"] == sidecar["nfe"] == 2


def test_a_mistake_is_found_before_anything_is_computed(small):
    with pytest.raises(RestoreError, match="unknown layer|no attention layer"):
        make_plan(small, "denoise", sampler="dps", steps=2, guidance=PAG(1.0, layers="i77"))


def test_the_command_prints_its_foundand_computes_nothing(small, tiny_adm, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "a.png")

    def command(*more):
        arguments = [
            "run",
            tmp_path / "a.png",
            "sigma=0.05",
            "--task",
            "denoise",
            "--backbone",
            tiny_adm,
            "--steps",
            "2",
        ]
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, [*arguments, "-o", tmp_path / "out", *more])])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    code, out, err = command("--dry-run")
    assert code == 0 and "a.png  56 x 40, diffpir in 2 steps, 2 evaluations, 24 windows, about" in out and "GB" in out
    assert not any((tmp_path / "out").iterdir())
    code, out, err = command("--quiet")
    assert (code, out, err) == (0, "", "") and (tmp_path / "out" / "a.png").exists()
    code, out, err = command("--overwrite")
    assert code == 0 and "24 windows, about" in err and "residual" in out
    code, out, err = command("--overwrite", "--memory", "0.1")
    assert code == 2 and "make the photo smaller" in err and "--force" in err and "Traceback" not in err


def test_limits_of_control_groups(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name, text in (("max", "3000\n"), ("current", "1000\n"), ("stat", "anon 400\ninactive_file 500\n")):
        (folder / f"memory.{name}").write_text(text)
    (tmp_path / "a" / "memory.max").write_text("max\n")
    (tmp_path / "groups").write_text("0::/a/b\n")
    assert list(available._group_memory(tmp_path, tmp_path / "groups")) == [2500]
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "100"), ("stat", "total_inactive_file 50")):
        (old / f"memory.{name}").write_text(text)
    (tmp_path / "groups").write_text("3:cpu,cpuacct:/job\n2:memory:/job\n")
    assert list(available._group_memory(tmp_path, tmp_path / "groups")) == [850]
    assert list(available._group_memory(tmp_path, Path("/nowhere"))) == []
    free = available.available_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15


def test_other_programs_are_told_from_the_work(small):
    planner, found = make_plan(small, "denoise")
    assert found.busy >= 1 and found.describe()["busy"] == found.busy
    planner.meter.waited, planner.meter.worked = 9.0, 3.0
    assert planner.meter.busy == 3


def test_a_small_network_is_counted_as_the_same_network_without_data_is(small, monkeypatch):
    counted = []
    for work in (measure.QUICK_WORK, 0):
        monkeypatch.setattr(measure, "QUICK_WORK", work)
        counted += [make_plan(small, "denoise", sampler="dps", steps=2, guidance=GUIDED)[1].memory]
        counted += [make_plan(small, "denoise", sampler="diffpir", steps="quad:2", guidance=None)[1].memory]
    assert counted[:2] == pytest.approx(counted[2:], rel=0.02)
