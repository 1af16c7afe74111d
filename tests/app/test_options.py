"""Settings, user-defined samplers, tasks and guidance on the command line, and messages that name its options."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import operators
from operators import RestoreError
from restore import guidance as guidances
from restore.app import cli, options, run
from restore.app.choice import PAGOverride
from restore.app.files import Photo
from restore.guidance import CFG, PAG
from restore.paths import data_dir
from restore.task import load_task, measure_photo

FACE = data_dir() / "photos" / "astronaut-face-64.png"

OWN = '''
import torch
import operators


class Darker(operators.Operator):
    """y = gain x"""

    name = "darker"

    def __init__(self, gain=0.5, **options):
        super().__init__(**options)
        self.gain = gain

    def A(self, x):
        return self.gain * x


def mean_of_y(prior, operator, y, *, noise, steps, guidance=None, condition=None, callback=None, weight: float = 1.0):
    """Not a posterior sampler; its results are known."""
    return weight * operator.A_adjoint(y)
'''


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(*arguments) -> (exit code, stdout, stderr), in a folder with own_things.py."""
    (tmp_path / "own_things.py").write_text(OWN)
    Image.open(FACE).resize((16, 16)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_things", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err.split("\r")[-1].strip()

    return call


def sidecar(tmp_path):
    return json.loads((tmp_path / "out" / "a.json").read_text())


def test_user_defined_sampler_and_operator(command, tmp_path):
    """A task is a YAML file; sampler and operator are module:attribute."""
    (tmp_path / "dark.yaml").write_text("name: own_things:Darker\ngain: 0.25\nnoise: {name: gaussian, sigma: 0.01}\n")
    arguments = ["a.png", "--sampler", "own_things:mean_of_y", "--steps", 1, "-o", "out", "--overwrite"]
    code, _, err = command("run", *arguments, "--task", "dark.yaml", "weight=2", "gain=0.5")
    assert code == 0, err
    assert sidecar(tmp_path)["protocol"]["method"]["sampler"] == "own_things:mean_of_y"
    assert sidecar(tmp_path)["protocol"]["method"]["parameters"] == {"weight": 2}
    assert sidecar(tmp_path)["settings"]["task"]["task"] == "dark"
    assert sidecar(tmp_path)["settings"]["task"]["gain"] == 0.5
    assert Image.open("out/a.png").tobytes() == Image.open("a.png").tobytes()  # 2 · 0.5 · y
    for task in ("own_things:Darker", "{name: own_things:Darker}"):
        code, _, err = command("run", *arguments, "--task", task)
        assert code == 0, err
    code, _, err = command("run", *arguments, "--task", "dark.yaml", "weigth=2")
    assert code == 2 and "did you mean 'weight'" in err


def test_overriding_pag_keeps_the_presets_other_terms():
    changed = PAGOverride(scale=3.0, layers="i5:0,3", strength=0.5).apply(CFG(2.0) + PAG(1.0, layers="i5"), [])
    assert changed == CFG(2.0) + PAG(3.0, layers="i5:0,3", strength=0.5)
    assert PAGOverride(layers="m1").apply(PAG(1.5, layers="i5"), []).terms == (PAG(1.5, layers="m1"),)
    assert PAGOverride(scale=2.0).apply(CFG(1.0), ["m1"]) == PAG(2.0, layers=["m1"]) + CFG(1.0)
    assert PAGOverride(scale=2.0).apply(None, ["m1"]).terms == (PAG(2.0, layers=["m1"]),)
    with pytest.raises(RestoreError, match="layers= needs pag_scale="):
        PAGOverride(layers="m1").apply(None, ["m1"])
    with pytest.raises(RestoreError, match="several PAG terms"):
        PAGOverride(scale=1.0).apply(PAG(1.0, layers="i5") + PAG(1.0, layers="m1"), [])


def test_guidance_as_yaml_and_from_a_file(command, tmp_path):
    (tmp_path / "guidance.yaml").write_text("pag: {scale: 2, layers: m1, strength: 0.5}\n")
    arguments = ["run", "a.png", "--task", "denoise", "--steps", 2, "-o", "out", "--overwrite"]
    for text in ("guidance.yaml", "{pag: {scale: 2, layers: m1, strength: 0.5}}"):
        code, _, err = command(*arguments, "--guidance", text)
        assert code == 0, err
        (term,) = sidecar(tmp_path)["protocol"]["method"]["guidance"]
        assert term["pag"]["scale"] == 2 and term["pag"]["strength"] == 0.5
    code, _, err = command(*arguments, "--pag-scale", 2, "--layers", "m1", "--target", "uniform", "--strength", 0.5)
    assert code == 0, err
    (term,) = sidecar(tmp_path)["protocol"]["method"]["guidance"]
    assert term["pag"]["target"] == "uniform" and term["pag"]["strength"] == 0.5
    code, _, err = command(*arguments, "--guidance", "{}")
    assert code == 0 and sidecar(tmp_path)["protocol"]["method"]["guidance"] is None, err


def test_heads_with_their_strengths_and_targets_with_options(command, tmp_path):
    """The same guidance by options, as YAML, and from Python; another term beside it."""
    arguments = ["run", "a.png", "--task", "denoise", "--steps", 2, "-o", "out", "--overwrite"]
    strength, target = "{m1: {0: 0.5, 3: 1.0}}", "{seg: {sigma: 2}}"
    pag_options = ["--pag-scale", 2, "--layers", "m1:0,3", "--strength", strength, "--target", target]
    code, _, err = command(*arguments, *pag_options)
    assert code == 0, err
    described = sidecar(tmp_path)["protocol"]["method"]["guidance"]
    expected = PAG(2, "m1:0,3", strength={"m1": {0: 0.5, 3: 1.0}}, target={"seg": {"sigma": 2}})
    assert described == guidances.describe_guidance(expected)
    ours = (tmp_path / "out" / "a.png").read_bytes()
    yaml = f"[{{pag: {{scale: 2, layers: 'm1:0,3', strength: {strength}, target: {target}}}}}]"
    code, _, err = command(*arguments, "--guidance", yaml)
    assert code == 0 and (tmp_path / "out" / "a.png").read_bytes() == ours, err
    code, _, err = command(*arguments, "--guidance", "[{sag: {scale: 0.5}}, {tpg: {scale: 1, layers: o0}}]")
    assert code == 0 and sidecar(tmp_path)["nfe"] == 3 * 2, err
    assert [next(iter(term)) for term in sidecar(tmp_path)["protocol"]["method"]["guidance"]] == ["sag", "tpg"]

    arguments = ["generate", "-n", 1, "--steps", 2, "-o", "samples", "--overwrite"]
    code, _, err = command(*arguments, *pag_options)
    assert code == 0, err
    assert json.loads((tmp_path / "samples" / "sample-0000.json").read_text())["guidance"] == described
    for wrong, message in (
        (["--strength", "half", "--pag-scale", 1], "--strength half must be a number"),
        (["--strength", "{m1: {0: 2}}", "--pag-scale", 1], "must be a number in [0, 1], got 2"),
        (
            ["--strength", "{m1: {0: 1}}", "--pag-scale", 1, "--layers", "m1:0,3"],
            "must be given for heads [0, 3], got [0]",
        ),
        (["--strength", "0.5"], "--strength needs --pag-scale"),
        (["--target", "{sge: {sigma: 2}}", "--pag-scale", 1], "did you mean 'seg'"),
    ):
        code, _, err = command(*arguments, *wrong)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_pictures_of_a_trajectory(command, tmp_path):
    arguments = ["run", "a.png", "--task", "denoise", "--steps", 3, "-o", "out", "--overwrite", "--save-trajectory"]
    code, _, err = command(*arguments, "--guidance", "[{pag: {scale: 1, layers: m1}}, {tsg: {scale: 1}}]")
    assert code == 0, err
    one = Image.open(tmp_path / "out" / "a-guidance.png")
    assert one.height > 2 * 128 and one.width > 3 * 128
    assert sidecar(tmp_path)["files"] == ["a.png", "a.json", "a-trajectory.png", "a-guidance.png"]
    code, _, err = command(*arguments, "--guidance", "{}")
    assert code == 0 and sidecar(tmp_path)["files"] == ["a.png", "a.json", "a-trajectory.png"], err


def test_layers_and_heads_are_listed(command):
    code, out, _ = command("models", "layers", "embedded")
    assert code == 0 and out.count("0..3") == 7
    code, out, _ = command("models", "layers", "embedded", "--layers", "i5:0,3,m1")
    assert code == 0 and [line.split()[3] for line in out.splitlines()[1:]] == ["0,3", "0..3"]
    code, _, err = command("models", "layers", "embedded", "--layers", "i5:4")
    assert code == 2 and "must be in 0..3, got [4]" in err


def test_steps_are_parsed_once():
    assert [options.parse_steps(text) for text in ("1000", "-5", "ddim50", None)] == [1000, -5, "ddim50", None]


@pytest.mark.parametrize(
    "message, spoken",
    [
        ("solve_at=50 is no multiple", "--solve-at 50 is no multiple"),
        ("needs mask=FILE (white); with degrade=True the", "needs --mask FILE (white); with --degrade the"),
        ("use checkpointing=True, a smaller batch_size or", "use --checkpointing, a smaller --batch-size or"),
        ("or precision='bf16'", "or --precision bf16"),
        ("steps must be at least 1, got 0", "--steps must be at least 1, got 0"),
        ('or precision="bf16".', "or --precision bf16."),
        ("zeta=3 and /tmp/mask=1/seed=2.png stay", "zeta=3 and /tmp/mask=1/seed=2.png stay"),
        ("write a mask or a batch", "write a mask or a batch"),
        ("resample=nearest needs solve_at=: nothing", "--resample nearest needs --solve-at: nothing"),
    ],
)
def test_messages_name_options(message, spoken):
    names = cli.list_options(["run", "photo.png"])
    assert options.translate_parameters(message, names) == spoken.rstrip(".") + ("." if message.endswith(".") else "")


def test_no_message_of_the_library_names_an_option():
    """The library speaks of parameters. Headings of tables and style sheets are no options."""
    root = data_dir().parent
    found = [
        f"{path.relative_to(root)}:{number}"
        for folder in ("restore", "operators")
        for path in (root / folder).rglob("*.py")
        if "app" not in path.parts and path.name != "style.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(f"{mark}--{letter}" in line for mark in " \"'(" for letter in "abcdefghijklmnopqrstuvwxyz")
        and "`restore " not in line
    ]
    assert not found


def test_version_help_and_completion(command):
    code, out, _ = command("--version")
    assert code == 0 and out.startswith("restore ")
    for flag in ("-h", "--help"):
        code, out, _ = command("run", flag)
        assert code == 0 and "--solve-at" in out
    code, out, _ = command("--help")
    assert "--install-completion" in out


def test_a_task_is_found_by_name_factor_file_and_text(tmp_path):
    settings = {"sigma": 0.1, "zeta": 2.0}
    found = load_task("sr2", settings)
    assert (found.name, found.factor, settings) == ("sr2", 2, {"zeta": 2.0})
    assert found.config["noise"] == {"name": "gaussian", "sigma": 0.1}
    (tmp_path / "mine.yaml").write_text("name: gaussian_blur\nstd: 2.0\nkernel_size: 9\n")
    mine = load_task(str(tmp_path / "mine.yaml"))
    assert mine.name == "mine" and isinstance(mine.build(32, 32), operators.GaussianBlur)
    assert load_task("{name: denoising, noise: null}").build(8, 8).noise is None
    for text, message in (
        ("- name\n- b\n", "operator"),
        ("std: 2\n", "operator"),
        ("name: [\n", "not readable"),
        ("\x00\x01", "not readable"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RestoreError, match=message) as caught:
            load_task(str(tmp_path / "bad.yaml"))
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(RestoreError, match="not readable"):
        load_task(str(tmp_path / "binary.yaml"))


def test_colorization_measures_one_channel(tmp_path):
    """y has one channel where A(x) has: colorization of a photo that was saved in colour."""
    from restore.app.files import find_photos

    Image.open(FACE).save(tmp_path / "a.png")
    photos = find_photos([tmp_path / "a.png"], tmp_path / "out")
    found = measure_photo(photos[0].source, load_task("colorize"), image_id="a")
    assert found.y.shape == (1, 1, 64, 64)
    assert torch.allclose(found.y, found.operator.A(found.record.pixels), atol=1e-6)


def test_a_caution_is_said_once_and_not_in_quiet(capsys):
    outcomes = [run.Outcome(Photo(Path(name), Path(name)), caution="too narrow by 3x") for name in ("a.png", "b.png")]
    options.print_outcomes(outcomes)
    out, err = capsys.readouterr()
    assert err == "restore: too narrow by 3x\n" and "narrow" not in out
    options.print_outcomes(outcomes, quiet=True)
    assert capsys.readouterr() == ("", "")
