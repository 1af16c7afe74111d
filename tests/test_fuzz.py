"""More than 10,000 images, kernels, masks, YAML texts, configurations, folders of runs and option strings: each is
taken, or refused in one sentence."""

import copy
import io
import json
import os
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from operators import RestoreError
from restore.app import cli, options
from restore.backbones.schedule import Schedule
from restore.bench.config import load_config
from restore.images import masks
from restore.images.io import read_image
from restore.paths import configs_dir
from restore.report.tables import read_run
from restore.search import config as search_config
from restore.task import load_task
from restore.training import load_training_config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SHARE = float(os.environ.get("RESTORE_FUZZ", "1"))  # of all examples


def examples(n: int):
    off = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=max(1, int(n * SHARE)), derandomize=True, deadline=None, database=None,
                    suppress_health_check=off)  # fmt: skip


@contextmanager
def one_sentence():
    """Within the block, whatever is refused is refused by a RestoreError of one line."""
    try:
        yield
    except RestoreError as error:
        text = str(error)
        assert text.strip() and "\n" not in text and "Traceback" not in text, text


def _picture(kind: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(levels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _array(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


KINDS = [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "1"), ("PNG", "I")]
KINDS += [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("WEBP", "RGB"),
    ("BMP", "P"),
]
KINDS += [("GIF", "P"), ("PPM", "RGB")]
PICTURES = [_picture(*kind) for kind in KINDS]
KERNELS = [
    _array(np.full((3, 3), 1 / 9)),
    _array(np.eye(3, dtype=np.float32) / 3),
    _array(np.array([[1]], dtype=np.uint8)),
]
KERNELS += [b"0 0.5\n0.5 0\n", b"0,1;0,0\n", PICTURES[1]]


@st.composite
def damaged(draw, whole):
    """One of `whole` with bytes changed, taken out, put in or cut off; sometimes nothing but noise."""
    content = bytearray(draw(st.sampled_from([*whole, b""])))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["change", "cut", "put", "drop", "text"]))
        if kind == "change" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "put":
            content[at:at] = draw(st.binary(max_size=12))
        elif kind == "text":
            content[at:at] = draw(st.sampled_from([b"nan", b"1e400", b"-1", b"99999999999", b"\xff\xff\xff\xff", b"'"]))
        else:
            del content[at : at + draw(st.integers(1, 9))]
    return bytes(content)


def _values():
    plain = st.one_of(
        st.sampled_from(
            [None, True, "", "nan", "inf", "1e9", "abc", "a:b", "os:getcwd", "[", "{}", "ümlaut", 0, -1, 1, 2, 61]
        ),
        st.sampled_from(
            [1e9, -0.5, 0.5, 1e-30, float("nan"), float("inf"), 10**30, "quad:9", "ddim25", "10,5", "karras:3"]
        ),
        st.integers(-5, 300),
        st.floats(),
        st.text(max_size=8),
    )
    return st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
    )


TASKS = sorted(path.stem for path in (configs_dir() / "task").glob("*.yaml"))
WORDS = [
    "name",
    "noise",
    "sigma",
    "factor",
    "kernel",
    "kernel_size",
    "std",
    "intensity",
    "mask",
    "size",
    "seed",
    "fraction",
]
WORDS += [
    "pag",
    "cfg",
    "scale",
    "layers",
    "target",
    "strength",
    "interval",
    "schedule",
    "combine",
    "zeta",
    "lam",
    "steps",
]
WORDS += [
    "samples",
    "callback",
    "gaussian",
    "poisson",
    "gaussian_blur",
    "motion_blur",
    "inpainting_box",
    "super_resolution",
]
NAMES = st.one_of(st.sampled_from([*WORDS, *TASKS]), st.text(max_size=6))
VALUES = _values()


@examples(3000)
@given(content=damaged(PICTURES))
def test_images(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with one_sentence():
        record = read_image(tmp_path / "a.png")
        assert record.pixels.shape[:2] == (1, 3) and record.pixels.isfinite().all() and record.pixels.abs().max() <= 1


@examples(1000)
@given(content=damaged(PICTURES))
def test_masks(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with one_sentence():
        mask = masks.read_mask(tmp_path / "a.png")
        assert set(mask.unique().tolist()) == {0, 1}


@examples(1500)
@given(content=damaged(KERNELS), suffix=st.sampled_from([".npy", ".txt", ".csv", ".png"]))
def test_kernels(tmp_path, content, suffix):
    (tmp_path / f"k{suffix}").write_bytes(content)
    with one_sentence():
        kernel = masks.read_kernel(tmp_path / f"k{suffix}")
        assert kernel.ndim == 2 and abs(float(kernel.sum()) - 1) < 1e-3


@examples(1500)
@given(content=st.dictionaries(NAMES, VALUES, max_size=4), name=st.one_of(st.sampled_from([*WORDS, *TASKS]), VALUES))
def test_tasks(tmp_path, content, name):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"name": name, **content}))
    with one_sentence():
        load_task(str(tmp_path / "task.yaml")).build(16, 16)


@examples(500)
@given(
    text=st.one_of(damaged([b"{name: gaussian_blur, std: 2}", b"- 1\n", b"a: ${b}\nb: ${a}\n"]), st.binary(max_size=40))
)
def test_texts_of_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_bytes(text)
    for read in (
        lambda: load_task(str(tmp_path / "a.yaml")).build(16, 16),
        lambda: options.parse_guidance(str(tmp_path / "a.yaml"), None, None, None, None),
        lambda: load_config(tmp_path / "a.yaml"),
    ):
        with one_sentence():
            read()


@examples(1000)
@given(
    written=st.lists(st.tuples(NAMES, VALUES), max_size=3),
    task=st.sampled_from([*TASKS, "sr3", "sr0", "sr99999999", "x"]),
    sampler=st.sampled_from([None, "dps", "diffpir", "nothing", "a:b"]),
)
def test_settings(written, task, sampler):
    with one_sentence():
        _, found = options.split_settings([f"{name}={value}" for name, value in written])
        task = load_task(task, found)
        options.check_settings(found, sampler, ["seed", "samples"])
        task.build(16, 16)


@examples(700)
@given(content=st.one_of(VALUES, st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=3), max_size=3)))
def test_guidance(tmp_path, content):
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    with one_sentence():
        options.parse_guidance(str(tmp_path / "g.yaml"), None, None, None, None)


@examples(400)
@given(
    text=st.one_of(
        st.text(max_size=10), st.sampled_from(["quad:0", "ddim0", "10,,5", "karras:1e9", "log:", "-3", "nan"])
    )
)
def test_steps_and_labels(text):
    with one_sentence():
        assert Schedule.from_config({}).timesteps(options.parse_steps(text))
    with one_sentence():
        options.parse_labels(text)


def _shipped(kind):
    """Every configuration of that kind, its open values filled in."""
    texts = [path.read_text().replace("???", "x") for path in sorted((configs_dir() / kind).glob("*.yaml"))]
    return [yaml.safe_load(text) for text in texts]


CONFIGURATIONS = {"benchmark": load_config, "search": search_config.load_search}
CONFIGURATIONS["train"] = lambda config: load_training_config(config, ["seed=1"])
SHIPPED = [(kind, config) for kind in CONFIGURATIONS for config in _shipped(kind)]


@st.composite
def changed(draw, whole):
    """One of `whole` with up to three entries, at any depth, exchanged, taken out or added."""
    kind, config = copy.deepcopy(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 3))):
        place = config
        while True:
            keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys))) if keys else None
            if key is None or not isinstance(place[key], (dict, list)) or draw(st.booleans()):
                break
            place = place[key]
        what = draw(st.sampled_from(["value", "value", "out", "more"]))
        if what == "more" and isinstance(place, dict):
            place[draw(NAMES)] = draw(VALUES)
        elif what == "out" and key is not None:
            del place[key]
        elif key is not None:
            place[key] = draw(VALUES)
    return kind, config


@examples(1000)
@given(found=changed(SHIPPED))
def test_configurations(tmp_path, found):
    kind, config = found
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    with one_sentence():
        CONFIGURATIONS[kind](tmp_path / "a.yaml")


RUN = {"format": 2, "created": "x", "identity": {"config": {"seed": 0}}, "protocol": {"tasks": {"t": {}}, "seed": 0}}
RUN |= {"config": {"name": "x", "tasks": {"t": {}}, "methods": {"m": {"sampler": "dps"}}, "kind": "restoration"}}
METRICS = {
    "metrics": ["psnr"],
    "shown": {},
    "table": {"t": {"m": {"expected": 1, "done": 1, "missing": 0, "means": {}}}},
}


@examples(300)
@given(run=changed([("", RUN)]), metrics=changed([("", METRICS)]), text=damaged([b"{}"]), broken=st.booleans())
def test_folders_of_runs(tmp_path, run, metrics, text, broken):
    (tmp_path / "run.json").write_bytes(text if broken else json.dumps(run[1]).encode())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics[1]))
    with one_sentence():
        read_run(tmp_path)


@examples(400)
@given(
    verb=st.sampled_from(["run", "degrade", "generate", "bench", "report", "evaluate", "models", "train", "ui"]),
    pairs=st.lists(
        st.tuples(
            st.sampled_from(
                ["--task", "--mask", "--kernel", "--sampler", "--seed", "--steps", "--layers", "--quality", "-o"]
            ),
            st.one_of(
                st.sampled_from(["", "-1", "abc", "sr4", "denoise", "1e9", "\udcff", "/nowhere/x"]), st.text(max_size=6)
            ),
        ),
        max_size=4,
    ),
)
def test_commands(tmp_path, monkeypatch, capsys, verb, pairs):
    """None of these names an input that exists, so that none gets as far as a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["restore", verb, "missing.png", *(part for pair in pairs for part in pair), "x=1"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code in (0, 2) and "Traceback" not in err
