"""The command line on the embedded prior: real runs of few steps, and every mistake a user can make."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from restore.app import cli, run
from restore.paths import data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"
MASK = data_dir() / "masks" / "scratches-64.png"


def test_restore_a_damaged_photo(command, tmp_path):
    damaged = data_dir() / "photos" / "astronaut-face-64-scratched.png"
    code, out, err = command(
        "run", damaged, "--task", "inpaint", "--mask", MASK, "--steps", 4, "-o", tmp_path, "--save-trajectory"
    )
    assert code == 0, err
    result = tmp_path / damaged.name
    assert Image.open(result).size == (64, 64)
    sidecar = json.loads((tmp_path / "astronaut-face-64-scratched.json").read_text())
    assert sidecar["protocol"]["seed"] == 0 and sidecar["protocol"]["method"]["steps"] == 4 and sidecar["nfe"] >= 4
    assert sidecar["residual_ratio"] > 0 and sidecar["seconds"] > 0 and sidecar["version"]
    assert (tmp_path / "astronaut-face-64-scratched-trajectory.png").exists()

    # A second call skips the finished file, --overwrite repeats it with the same bytes.
    before = result.read_bytes()
    changed = result.stat().st_mtime_ns
    again = ("run", damaged, "--task", "inpaint", "--mask", MASK, "--steps", 4, "-o", tmp_path, "--save-trajectory")
    code, out, err = command(*again)
    assert code == 0 and "finished before" in out and result.stat().st_mtime_ns == changed
    command(*again, "--overwrite")
    assert result.read_bytes() == before and result.stat().st_mtime_ns != changed


def test_degrade_restores_and_scores_and_samples_do_not_change_an_image(command, tmp_path):
    common = ("--task", "sr4", "--degrade", "--steps", 3, "--pag-scale", 1, "--layers", "m1")
    code, out, err = command("run", FACE, *common, "-o", tmp_path / "one")
    assert code == 0, err
    assert "PSNR" in out and "SSIM" in out
    code, _, err = command("run", FACE, *common, "--samples", 3, "-o", tmp_path / "three")
    assert code == 0, err
    one, three = tmp_path / "one", tmp_path / "three"
    assert (one / FACE.name).read_bytes() == (three / FACE.name).read_bytes()
    names = {path.name for path in three.iterdir()}
    stem = FACE.stem
    assert {f"{stem}-sample1.png", f"{stem}-sample2.png", f"{stem}-mean.png", f"{stem}-spread.png"} <= names
    assert (three / f"{stem}-sample1.png").read_bytes() != (three / f"{stem}-sample2.png").read_bytes()
    assert Image.open(one / f"{stem}-degraded.png").size == (16, 16)
    sidecars = [json.loads((folder / f"{stem}.json").read_text()) for folder in (one, three)]
    assert sidecars[0]["nfe"] == 6 and "spread" not in sidecars[0]
    said = sidecars[1]["spread"]  # the nearest row of DiffPIR with zeta 1
    assert said["verdict"] == "too narrow" and said["evaluations"] == 20 and 0.5 < said["spread_error"] < 0.9
    assert "without guidance" in said["note"] and "caution" not in said and "spread" not in err

    # Another seed is another image; order and company do not matter.
    other = tmp_path / "other"
    shutil.copy(FACE, tmp_path / "b.png")
    command("run", tmp_path / "b.png", FACE, *common, "-o", other)
    assert (other / FACE.name).read_bytes() == (one / FACE.name).read_bytes()
    assert (other / "b.png").read_bytes() != (one / FACE.name).read_bytes()  # the name seeds the noise
    command("run", FACE, *common, "--seed", 1, "-o", tmp_path / "seed1")
    assert (tmp_path / "seed1" / FACE.name).read_bytes() != (one / FACE.name).read_bytes()


def test_seed_zero_is_a_seed(command, tmp_path):
    for folder in ("a", "b"):
        command("generate", "-n", 1, "--steps", 2, "--seed", 0, "-o", tmp_path / folder)
    a, b = ((tmp_path / folder / "sample-0000.png").read_bytes() for folder in ("a", "b"))
    assert a == b
    command("generate", "-n", 1, "--steps", 2, "--seed", 5, "-o", tmp_path / "c")
    assert (tmp_path / "c" / "sample-0000.png").read_bytes() != a


def test_formats_orientation_grey_alpha_and_sizes(command, tmp_path):
    photo = Image.open(FACE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.resize((40, 24)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    photo.convert("L").resize((30, 50)).save(tmp_path / "grey.png")
    photo.resize((24, 24)).convert("RGBA").save(tmp_path / "alpha.png")
    deep = np.asarray(photo.convert("L").resize((24, 24)), dtype=np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    photo.resize((80, 70)).save(tmp_path / "large.png")  # beyond 64: windows
    code, _, err = command("run", tmp_path, "--task", "denoise", "--steps", 2, "-o", tmp_path / "out")
    assert code == 0, err
    out = tmp_path / "out"
    turned = Image.open(out / "turned.jpg")
    assert turned.size == (24, 40) and turned.getexif().get(0x0112, 1) == 1
    assert Image.open(out / "grey.png").mode == "L" and Image.open(out / "grey.png").size == (30, 50)
    assert Image.open(out / "alpha.png").mode == "RGBA"
    assert Image.open(out / "deep.png").mode.startswith("I")
    assert Image.open(out / "large.png").size == (80, 70)


def test_user_kernel_and_settings(command, tmp_path):
    kernel = np.zeros((5, 5))
    kernel[2] = 0.2
    np.save(tmp_path / "kernel.npy", kernel)
    code, _, err = command(
        "run",
        FACE,
        "--task",
        "blur",
        "--kernel",
        tmp_path / "kernel.npy",
        "--steps",
        2,
        "zeta=0.7",
        "sigma=0.1",
        "-o",
        tmp_path / "out",
    )
    assert code == 0, err
    sidecar = json.loads((tmp_path / "out" / f"{FACE.stem}.json").read_text())
    assert sidecar["protocol"]["method"]["parameters"]["zeta"] == 0.7
    assert sidecar["settings"]["task"]["noise"] == {"name": "gaussian", "sigma": 0.1}


def test_degrade_and_models(command, tmp_path):
    code, out, err = command("degrade", FACE, "--task", "motion-blur", "kernel_size=9", "-o", tmp_path)
    assert code == 0 and (tmp_path / FACE.name).exists(), err
    code, out, _ = command("models", "list")
    assert code == 0 and "embedded" in out and "adm-ffhq-256" in out and "sd-1.5" in out
    code, out, _ = command("models", "show", "adm-imagenet-256")
    assert code == 0 and "256x256_diffusion_uncond.pt" in out
    code, out, _ = command("models", "layers", "embedded")
    assert code == 0 and "mid_block.attentions.0" in out and "m1" in out


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def mistakes(folder):
    """name -> (arguments, what the one sentence must contain)."""
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(FACE.read_bytes()[:900])
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(folder / "small-mask.png")
    Image.new("L", (64, 64), 0).save(folder / "nothing-known.png")
    np.save(folder / "heavy.npy", np.ones((3, 3)))
    np.save(folder / "nan.npy", np.full((3, 3), np.nan))
    large = np.full((201, 201), 1 / 201**2)
    np.save(folder / "large.npy", large)
    torch.save(Hostile(), folder / "hostile.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "wrong.pt")
    Image.new("RGBA", (8, 8), (9, 9, 9, 9)).save(folder / "alpha.png")
    (folder / "twin").mkdir()
    shutil.copy(FACE, folder / "twin" / "a.png")
    Image.open(FACE).save(folder / "twin" / "a.jpg")
    (folder / "file").write_text("")
    face, sr = ["run", FACE], ["--task", "sr4", "--steps", 2]
    out = ["-o", folder / "out"]
    return {
        "missing": (["run", folder / "none.png", *sr, *out], "none.png"),
        "not an image": (["run", folder / "text.png", *sr, *out], "text.png"),
        "truncated": (["run", folder / "cut.png", *sr, *out], "cut.png"),
        "task": ([*face, "--task", "sr", *out], "unknown task 'sr'"),
        "mask size": ([*face, "--task", "inpaint", "--mask", folder / "small-mask.png", *out], "64"),
        "mask empty": ([*face, "--task", "inpaint", "--mask", folder / "nothing-known.png", *out], "known"),
        "mask forgotten": ([*face, "--task", "inpaint", *out], "--mask"),
        "mask elsewhere": ([*face, *sr, "--mask", MASK, *out], "--mask"),
        "kernel sum": ([*face, "--task", "blur", "--kernel", folder / "heavy.npy", *out], "9"),
        "kernel nan": ([*face, "--task", "blur", "--kernel", folder / "nan.npy", *out], "NaN"),
        "kernel large": ([*face, "--task", "blur", "--kernel", folder / "large.npy", *out], "201"),
        "kernel forgotten": ([*face, "--task", "blur", *out], "--kernel"),
        "layer": ([*face, *sr, "--pag-scale", 1, "--layers", "i99", *out], "i99"),
        "zero steps": ([*face, "--task", "sr4", "--steps", 0, *out], "--steps must be"),
        "negative steps": ([*face, "--task", "sr4", "--steps=-5", *out], "got -5"),
        "setting": ([*face, *sr, "zetta=1", *out], "did you mean 'zeta'"),
        "samples": ([*face, *sr, "--samples", 0, *out], "samples"),
        "sampler": ([*face, *sr, "--sampler", "ddrn", *out], "unknown sampler"),
        "quality": ([*face, *sr, "--quality", "bets", *out], "did you mean 'best'"),
        "quality and sampler": (
            [*face, *sr, "--quality", "best", "--sampler", "dps", *out],
            "--quality must be left out",
        ),
        "own sampler": ([*face, *sr, "--sampler", "nowhere:sampler", *out], "nowhere"),
        "text as a number": ([*face, *sr, "zeta=abc", *out], "zeta must be a number in [0, 1], got 'abc'"),
        "no number": ([*face, *sr, "zeta=nan", *out], "zeta must be a number in [0, 1]"),
        "a list": ([*face, *sr, "zeta=[1,2]", *out], "zeta must be a number in [0, 1]"),
        "an open list": ([*face, *sr, "zeta=[1,2", *out], "zeta"),
        "option as setting": ([*face, *sr, "samples=3", *out], "--samples 3"),
        "seed as setting": ([*face, *sr, "seed=3", *out], "--seed 3"),
        "callback": ([*face, *sr, "callback=1", *out], "'callback'"),
        "no layers": ([*face, *sr, "--layers", "", *out], "--layers names no attention layer"),
        "layers and guidance": ([*face, *sr, "--layers", "m1", "--guidance", "{}", *out], "--guidance or --pag-scale"),
        "guidance": ([*face, *sr, "--guidance", "{pagg: {scale: 1}}", *out], "pagg"),
        "guidance file": ([*face, *sr, "--guidance", folder / "none.yaml", *out], "none.yaml"),
        "guidance text": ([*face, *sr, "--guidance", "{pag: [", *out], "not readable YAML"),
        "strength": ([*face, *sr, "--strength", 2, *out], "strength"),
        "task file": ([*face, "--task", folder / "none.yaml", *out], "none.yaml"),
        "task without operator": ([*face, "--task", "{noise: null}", *out], "operator"),
        "task module": ([*face, "--task", "nowhere:Operator", *out], "nowhere"),
        "alpha into jpeg": (["run", folder / "alpha.png", *sr, "-o", folder / "a.jpg"], "no transparency"),
        "heic": ([*face, *sr, "-o", folder / "a.heic"], "must end in"),
        "labels": (["generate", "--labels", "3,,4", *out], "--labels 3,,4 must be"),
        "port": (["ui", "--port", 99999999], "--port"),
        "windows": ([*face, *sr, "--max-windows", 0, *out], "--max-windows"),
        "backbone": ([*face, *sr, "--backbone", "embeded", *out], "embedded"),
        "pickle": ([*face, *sr, "--backbone", folder / "hostile.pt", *out], "code"),
        "wrong checkpoint": ([*face, *sr, "--backbone", folder / "wrong.pt", *out], "wrong.pt"),
        "precision": ([*face, *sr, "--precision", "fp8", *out], "fp8"),
        "device": ([*face, *sr, "--device", "warp", *out], "warp"),
        "same stem": (["run", folder / "twin", *sr, *out], "would both write"),
        "output is a file": ([*face, *sr, "-o", folder / "file" / "out"], "file"),
        "over the input": ([*face, *sr, "-o", FACE.parent], "overwrite"),
        "offline": ([*face, *sr, "--backbone", "adm-ffhq-256", "--offline", *out], "ffhq_10m.pt"),
        "no option": ([*face, *sr, "--stepps", 3, *out], "--stepps"),
        "model": (["models", "show", "nothing-like-it"], "nothing-like-it"),
    }


def test_mistakes_are_one_sentence(command, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    failures = []
    for name, (arguments, expected) in mistakes(tmp_path).items():
        code, out, err = command(*arguments)
        if code != 2 or expected not in err or len(err.strip().splitlines()) != 1 or "Traceback" in err or out:
            failures.append(f"{name}: exit {code}, {out!r}, {err!r}")
    assert not failures, "\n".join(failures)
    assert not list((tmp_path / "out").glob("*.png")) if (tmp_path / "out").exists() else True


def test_unwritable_folder_and_full_disk(command, tmp_path, monkeypatch):
    import os

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("run", FACE, "--task", "sr4", "--steps", 2, "-o", tmp_path / "out")
    assert code == 2 and "disk is full" in err
    assert [path for path in (tmp_path / "out").iterdir()] == []


def test_out_of_memory_names_what_lowers_it(command, tmp_path, monkeypatch):
    def exhausted(*arguments, zeta=1, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("restore.samplers.diffpir.diffpir", exhausted)
    code, _, err = command("run", FACE, "--task", "sr4", "--sampler", "diffpir", "--steps", 2, "-o", tmp_path)
    assert code == 2 and "--checkpointing" in err and "--batch-size" in err


@pytest.mark.parametrize("writes", [0, 1])
def test_interrupt_leaves_no_half_written_file(command, tmp_path, monkeypatch, writes):
    """Ctrl-C before the side-car's first version, and between the result and its last one."""
    original, done = run.disk.write_json, []

    def interrupt(*arguments, **options):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(original(*arguments, **options))

    monkeypatch.setattr(run.disk, "write_json", interrupt)
    code, _, err = command("run", FACE, "--task", "sr4", "--steps", 2, "-o", tmp_path)
    assert code == 130 and "same command" in err
    assert not list(tmp_path.iterdir())  # a result without its finished side-car would be made again
    monkeypatch.setattr(run.disk, "write_json", original)
    code, out, err = command("run", FACE, "--task", "sr4", "--steps", 2, "-o", tmp_path)
    assert code == 0 and "finished before" not in out, err
    assert json.loads((tmp_path / f"{FACE.stem}.json").read_text())["finished"]


def test_masks_inverted_grey_and_one_for_each_photo(command, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    white = np.full((64, 64), 255, np.uint8)
    for i, name in enumerate("ab"):
        shutil.copy(FACE, tmp_path / "photos" / f"{name}.png")
        grey = white.copy()
        grey[8 * i : 8 * i + 8] = 40
        grey[8 * i + 8] = 200
        Image.fromarray(grey).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(255 - np.where(grey > 127, white, 0).astype(np.uint8)).save(tmp_path / f"inverted-{name}.png")
    common = ("--task", "inpaint", "--steps", 1)
    code, _, err = command("run", tmp_path / "photos", *common, "--mask", tmp_path / "masks", "-o", tmp_path / "no")
    assert code == 2 and "in between" in err and "--mask-threshold 127" in err
    options = (*common, "--mask", tmp_path / "masks", "--mask-threshold", 127)
    code, _, err = command("run", tmp_path / "photos", *options, "-o", tmp_path / "own")
    assert code == 0, err
    for name in "ab":
        one = ("--mask", tmp_path / f"inverted-{name}.png", "--invert-mask", "-o", tmp_path / name)
        code, _, err = command("run", tmp_path / "photos" / f"{name}.png", *common, *one)
        assert code == 0, err
        assert (tmp_path / name / f"{name}.png").read_bytes() == (tmp_path / "own" / f"{name}.png").read_bytes()
    (tmp_path / "masks" / "b.png").unlink()
    code, _, err = command("run", tmp_path / "photos", *options, "-o", tmp_path / "lacking")
    assert code == 2 and "has none named b" in err and (tmp_path / "lacking" / "a.png").exists()
    code, _, err = command("run", FACE, "--task", "sr4", "--invert-mask", "-o", tmp_path / "x")
    assert code == 2 and "--invert-mask" in err and "need" in err


def test_pipes(monkeypatch, capfdbinary):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FACE.read_bytes())))
    monkeypatch.setattr(sys, "argv", ["restore", "run", "-", "--task", "sr4", "--degrade", "--steps", "1", "-o", "-"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfdbinary.readouterr()
    assert stop.value.code == 0 and Image.open(io.BytesIO(out)).size == (64, 64), err


def test_pipes_that_hold_no_picture_or_several(command, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    code, out, err = command("run", "-", "--task", "sr4", "-o", tmp_path)
    assert code == 2 and "stdin is not a readable image" in err and out == ""
    code, out, err = command("run", FACE, MASK, "--task", "sr4", "-o", "-")
    assert code == 2 and "2 inputs cannot go to one standard output" in err


def test_heic_is_named_where_it_cannot_be_read(command, tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    code, _, err = command("degrade", tmp_path, "--task", "sr4", "-o", tmp_path / "out")
    assert code == 2 and "a.heic is not a readable image" in err
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        assert "install pillow-heif" in err
