"""Scores of images and prompts by CLIP models of random weights, saved as the published ones are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_clip
import tiny_sd
import torch

from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.metrics import scores, table
from restore.metrics.evaluate import score_images
from restore.search.objective import Objective


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def models(clip, tmp_path_factory):
    """What metrics.models takes in place of the published models; HPSv2 and the aesthetic head in their own formats."""
    from transformers import CLIPModel

    root = tmp_path_factory.mktemp("models")
    fine_tuned = CLIPModel.from_pretrained(tiny_clip.save(root / "fine-tuned", seed=1))
    torch.save({"epoch": 3, "state_dict": tiny_clip.to_open_clip(fine_tuned)}, root / "hps.pt")
    generator = torch.Generator().manual_seed(2)
    shapes = {0: (6, 8), 2: (4, 6), 4: (1, 4)}
    head = {f"layers.{i}.weight": torch.randn(shape, generator=generator) for i, shape in shapes.items()}
    head |= {f"layers.{i}.bias": torch.randn(shape[0], generator=generator) for i, shape in shapes.items()}
    torch.save(head, root / "head.pth")
    return {"clip_l": str(clip), "clip_h": str(clip), "pick_score": str(clip), "hpsv2": str(root / "hps.pt"),
            "aesthetic": str(root / "head.pth")}  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 24, 24), generator=generator, dtype=torch.uint8)
    return pixels, ["a cat", "dogs"] * 10


def load(name, models):
    options = table.MetricOptions(models=models)
    return table.load_scores({name: table.find_metric(name)}, options)[name]


def own_output(folder, pictures):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=pictures[1], images=list(pictures[0]), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model, model(**inputs)


def test_scores_are_the_models_own_logits(clip, models, pictures):
    model, out = own_output(clip, pictures)
    logits, images = out.logits_per_image.diag(), pictures[0].float() / 127.5 - 1
    pick = load("pick_score", models)(images, pictures[1])
    assert torch.allclose(pick, logits, atol=1e-5) and pick.std() > 1e-3
    expected = 100 * (logits / model.logit_scale.exp()).clamp(min=0)
    assert torch.allclose(load("clip_score", models)(images, pictures[1]), expected, atol=1e-4)


def test_hpsv2_is_read_from_the_layout_of_its_file(models, pictures):
    model, out = own_output(Path(models["hpsv2"]).parent / "fine-tuned", pictures)
    expected = 100 * out.logits_per_image.diag() / model.logit_scale.exp()
    values = load("hpsv2", models)(pictures[0].float() / 127.5 - 1, pictures[1])
    assert torch.allclose(values, expected, atol=1e-4) and values.std() > 1e-3


def test_the_aesthetic_score_is_its_linear_layers_on_the_normalised_embedding(clip, models, pictures):
    _, out = own_output(clip, pictures)
    head, x = torch.load(models["aesthetic"]), out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    for i in (0, 2, 4):
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    values = load("aesthetic", models)(pictures[0].float() / 127.5 - 1, [""] * 20)
    assert torch.allclose(values, x.flatten(), atol=1e-4) and values.std() > 1e-3


def test_models_that_are_not_there_or_not_whole_are_refused(clip, models, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(RestoreError, match="compares every image with its prompt"):
        load("pick_score", models)(images, [""])
    with pytest.raises(RestoreError, match="metrics.models.pick_score must be .*does not exist"):
        load("pick_score", models | {"pick_score": str(tmp_path / "nothing")})
    with pytest.raises(RestoreError, match="did you mean 'pick_score'"):
        load("pick_score", {"pickscore": str(clip)})
    monkeypatch.setenv("RESTORE_OFFLINE", "1")
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RestoreError, match="cannot be loaded"):
        load("clip_score", {"clip_l": "nobody/nothing"})
    with pytest.raises(RestoreError, match="is missing and the run is offline; fetch https"):
        load("aesthetic", {"clip_l": str(clip)})
    for file in clip.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RestoreError, match="visual_projection.weight is missing"):
        load("clip_score", models | {"clip_l": str(tmp_path)})
    weights = torch.load(models["hpsv2"])
    weights["state_dict"].pop("text_projection")
    torch.save(weights, tmp_path / "hps.pt")
    with pytest.raises(RestoreError, match="text_projection.weight"):
        load("hpsv2", models | {"hpsv2": str(tmp_path / "hps.pt")})


def test_files_are_scored_with_their_prompts_in_any_size(models, pictures, tmp_path):
    from PIL import Image

    files = []
    for i, side in enumerate((16, 16, 24)):
        Image.new("RGB", (side, 16), (40 * i, 90, 10)).save(tmp_path / f"{i}.png")
        files.append((str(i), tmp_path / f"{i}.png", ["a cat", "dogs", "a cat"][i]))
    functions = {name: load(name, models) for name in ("pick_score", "aesthetic")}
    rows = score_images(files, functions)
    alone = [score_images([file], functions)[0] for file in files]
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    for row, single in zip(rows, alone, strict=True):
        assert row["pick_score"] == pytest.approx(single["pick_score"], abs=1e-5)
        assert row["aesthetic"] == pytest.approx(single["aesthetic"], abs=1e-5)
    with pytest.raises(RestoreError, match="own must return .* finite numbers"):
        score_images(files, {"own": lambda images, prompts: torch.full((len(images),), torch.nan)})


@pytest.fixture
def config(tmp_path, models):
    tiny_sd.save_folder(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nbirds\n")
    common = {"name": "scores", "kind": "text_to_image", "backbone": str(tmp_path / "sd"), "device": "cpu"}
    return common | {
        "out": str(tmp_path / "run"),
        "threads": 1,
        "batch": 2,
        "tasks": {"text": {"count": 3, "prompts": str(tmp_path / "prompts.txt"), "template": "{}, in oil"}},
        "methods": {"none": {"sampler": "pipeline", "steps": 2}},
        "metrics": {"names": ["clip_score", "pick_score", "hpsv2", "aesthetic"], "models": models},
    }


def test_scores_are_metrics_of_benchmarks(config, models, tmp_path):
    done = run_benchmark(config)
    cell = done.table["table"]["text"]["none"]
    assert set(config["metrics"]["names"]) <= set(cell["means"])
    paths = sorted((done.folder / "results" / "text" / "none").glob("*.png"))
    prompts = ["a cat, in oil", "a dog, in oil", "birds, in oil"]
    triples = [(path.stem, path, prompt) for path, prompt in zip(paths, prompts, strict=True)]
    rows = score_images(triples, {name: load(name, models) for name in ("pick_score", "hpsv2")})
    for name in ("pick_score", "hpsv2"):
        assert cell["means"][name]["mean"] == pytest.approx(sum(row[name] for row in rows) / 3, abs=1e-5)
    described = (done.folder / "run.json").read_text()
    assert "hps.pt" in described and "CLIP ViT-L/14" in described
    unknown = config["metrics"] | {"models": models | {"pick_score": "nobody/nothing"}}
    with pytest.raises(RestoreError, match="nobody/nothing cannot be loaded"):  # and no network is asked for it
        run_benchmark(config | {"out": str(tmp_path / "third"), "offline": True, "metrics": unknown})
    assert not (tmp_path / "third").exists()  # before anything runs
    config["tasks"]["text"]["prompts"] = None
    with pytest.raises(RestoreError, match="compares images with prompts"):
        run_benchmark(config | {"out": str(tmp_path / "other")})


def test_the_devices_number_reaches_the_models(config, models, monkeypatch):
    """`device: cuda:1` scores there; here the meta device, which no model can run on, stands for it."""
    seen = []
    monkeypatch.setattr(scores, "Clip", lambda place, device, *more: seen.append(device))
    with pytest.raises(AttributeError):
        table.load_scores(
            {"pick_score": table.find_metric("pick_score")}, table.MetricOptions(models=models), "cuda:1"
        )["pick_score"](torch.zeros(1, 3, 8, 8), ["a"])
    assert seen == ["cuda:1"]


def test_which_scores_can_be_objectives():
    assert Objective.from_config("pick_score", "text_to_image").weights == {"pick_score": -1.0}
    assert Objective.from_config("aesthetic", "generation").metrics == ["aesthetic"]
    with pytest.raises(RestoreError, match="hpsv2 compares images with prompts, which kind=restoration"):
        Objective.from_config("hpsv2")


def test_the_documented_score_of_ones_own_is_a_metric_and_an_objective(config, monkeypatch, tmp_path):
    """docs/heads.md's module, with a stand-in for the package that it needs."""
    text = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "# my_scores.py" in block]
    (tmp_path / "my_scores.py").write_text(code)
    package = "class Model:\n    def score(self, prompt, image):\n        return len(prompt) + image.width\n\n\n"
    (tmp_path / "ImageReward.py").write_text(package + "def load(name, device):\n    return Model()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config["metrics"]["names"] = ["my_scores:image_reward"]
    done = run_benchmark(config)
    means = done.table["table"]["text"]["none"]["means"]
    assert means["my_scores:image_reward"]["mean"] == pytest.approx(
        32 + (len("a cat, in oil") + len("a dog, in oil") + len("birds, in oil")) / 3
    )
    objective = Objective.from_config("my_scores:image_reward", "text_to_image")
    assert objective.weights == {"my_scores:image_reward": -1.0} and not objective.functions


def test_a_run_loads_each_model_once_to_check_and_once_to_measure(config, monkeypatch):
    loaded = []

    class Counted(scores.Clip):
        def __init__(self, *arguments):
            loaded.append(arguments[0])
            super().__init__(*arguments)

    monkeypatch.setattr(scores, "Clip", Counted)
    config["methods"] |= {f"more-{n}": {"sampler": "pipeline", "steps": n} for n in (1, 3)}
    config["metrics"]["names"] = ["pick_score"]
    run_benchmark(config)
    assert len(loaded) == 2
    run_benchmark(config)  # nothing is left to measure
    assert len(loaded) == 3
