"""Disks that are really full (a small tmpfs where it may be mounted, else a limit on a file's size) and readers that
leave: one sentence or silence, never a traceback, and no file without the ones it belongs to."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from operators import RestoreError
from restore import disk
from restore.bench.run import run_benchmark
from restore.paths import configs_dir, data_dir
from restore.training import load_training_config, train

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes, inodes) -> an empty folder on a file system of its own with that much room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def make(kilobytes, inodes=0):
        for _ in range(len(mounted)):
            subprocess.run(["umount", folder], check=True)
            mounted.pop()
        options = f"size={kilobytes}k,nr_inodes={inodes}"
        done = shutil.which("mount") and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True
        )
        if not done or done.returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(True)
        return folder

    yield make
    if mounted:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def files_of_at_most(n):
    """No file of this process can grow beyond n bytes within the block: the test runner's own log neither."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def restore(command):
    """restore(*arguments) -> exit code and what the command said of its failure."""

    def run(*arguments):
        code, _, err = command(*arguments)
        return code, [line for line in err.replace("\r", "\n").splitlines() if line.startswith("restore: ")]

    return run


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("write", ["bytes", "torch", "safetensors"])
def test_a_file_that_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path, write):
    tensors = {"a": torch.randn(5000)}

    def attempt():
        if write == "bytes":
            disk.write_bytes(tmp_path / "a", bytes(20000))
        elif write == "safetensors":
            disk.write_safetensors(tmp_path / "a", tensors)
        else:
            with disk.open_atomic(tmp_path / "a") as file:
                torch.save(tensors, file)

    attempt()
    whole = (tmp_path / "a").read_bytes()
    with files_of_at_most(10000), pytest.raises(RestoreError, match="cannot write .*a: file too large; nothing was"):
        attempt()
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == whole


@pytest.mark.parametrize("kilobytes", [4, 12, 20, 28])
def test_restoring(small_disk, restore, kilobytes):
    folder = small_disk(kilobytes) / "out"
    rc, said = restore("run", FACE, "--task", "denoise", "--steps", 1, "--samples", 2, "-q", "-o", folder)
    assert rc == 2 and len(said) == 1 and "the disk is full" in said[0] and names(folder) == []


def test_generating(small_disk, restore):
    folder = small_disk(24) / "out"
    rc, said = restore("generate", "-n", 3, "--steps", 2, "-o", folder)
    assert rc == 2 and len(said) == 1 and "the disk is full" in said[0]
    assert names(folder) == ["sample-0000.json", "sample-0000.png"]


@pytest.fixture
def config(tmp_path, tiny_run, write_images, smooth_images):
    write_images(tmp_path / "photos", smooth_images(2, 16, 0))
    config = tiny_run | {"data": {"folder": str(tmp_path / "photos")}, "tasks": {"t": "sr4"}, "batch": 1}
    return config | {"methods": {"m": {"sampler": "bicubic"}}}


@pytest.mark.parametrize("kilobytes, inodes", [(8, 0), (16, 0), (28, 0), (44, 0), (400, 4), (400, 9), (400, 14)])
def test_benchmarks_go_on_when_there_is_room_again(small_disk, config, tmp_path, kilobytes, inodes):
    folder = small_disk(kilobytes, inodes) / "run"
    with pytest.raises(RestoreError, match="the disk is full"):
        run_benchmark(config, [f"out={folder}"])
    assert not [name for name in names(folder) if name.endswith(".tmp")]
    for row in folder.rglob("rows/*.json"):
        assert (row.parent.parent / f"{row.stem}.png").exists()
    shutil.copytree(folder, tmp_path / "later")
    for out in ("whole", "later"):
        run_benchmark(config, [f"out={tmp_path / out}"])
    for part in ("results", "truth", "measurements"):
        whole, later = tmp_path / "whole" / part, tmp_path / "later" / part
        assert names(whole) == names(later)
        assert all((whole / name).read_bytes() == (later / name).read_bytes() for name in names(whole))


@pytest.fixture(scope="module")
def training(tmp_path_factory, write_images, smooth_images):
    """(training(out) -> folder of the weights, the weights of an undisturbed one)."""
    folder = tmp_path_factory.mktemp("training")
    write_images(folder / "faces", smooth_images(8, 32, 0))
    blocks = {"down": "[ResnetDownsampleBlock2D,AttnDownBlock2D]", "up": "[AttnUpBlock2D,ResnetUpsampleBlock2D]"}
    settings = [f"data.folder={folder / 'faces'}", "model.block_out_channels=[32,32]", "data.stored_size=32"]
    settings += [f"model.{name}_block_types={types}" for name, types in blocks.items()]
    settings += ["model.sample_size=16", "data.held_out_every=4", "batch=4", "precision=fp32", "steps=2", "log_every=1"]
    settings += ["held_out_every_steps=2", "samples_every_steps=2", "checkpoint_every_steps=1"]

    def run(out):
        ema = train(load_training_config(configs_dir() / "train" / "embedded.yaml", [*settings, f"out={out}"]))
        return next(ema.glob("*.safetensors")).read_bytes()

    return run, run(folder / "whole")


@pytest.mark.parametrize("kilobytes, inodes", [(8, 2), (500, 0), (6000, 0), (9000, 5)])
def test_training_goes_on_when_there_is_room_again(small_disk, tmp_path, training, kilobytes, inodes):
    run, whole = training
    folder = small_disk(kilobytes, inodes) / "out"
    with pytest.raises(RestoreError, match="the disk is full"):
        run(folder)
    assert not [name for name in names(folder) if name.endswith(".tmp")]
    if folder.exists():
        shutil.copytree(folder, tmp_path / "later")
    assert run(tmp_path / "later") == whole


def process(*arguments, stdout):
    """The command in a process of its own: its exit code, and what it said beside its plan and its progress."""
    usual = ("%|", " GB of ", "  prior: ")
    call = [sys.executable, "-m", "restore.app.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
    lines = done.stderr.replace("\r", "\n").splitlines()
    return done.returncode, [line for line in lines if line.strip() and not any(part in line for part in usual)]


def test_standard_output_on_a_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "wb") as full:
        assert process("models", "list", stdout=full) == (2, ["restore: cannot write: the disk is full"])


@pytest.mark.parametrize("verb", ["run", "generate", "list"])
def test_a_reader_that_leaves_ends_it_quietly(tmp_path, verb):
    photos = [shutil.copy(FACE, tmp_path / f"{name}.png") for name in "abc"]
    out = tmp_path / "out"
    arguments = {
        "run": ["run", *photos, "--task", "denoise", "--steps", 1, "-o", out],
        "generate": ["generate", "-n", 3, "--steps", 1, "-o", out],
        "list": ["models", "list"],
    }[verb]
    reader, writer = os.pipe()
    os.close(reader)  # as if it had read what it wanted
    assert process(*arguments, stdout=writer) == (1, [])
    os.close(writer)
    if verb != "list":  # the first result is whole, the others are not begun
        assert [name.rpartition(".")[2] for name in names(out)] == ["json", "png"]
