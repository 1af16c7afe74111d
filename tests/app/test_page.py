"""The page without a browser: its work on photos, its words, and what gradio_client calls."""

import base64
import io
import json
import sys
import threading

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch

import restore
from operators import RestoreError
from restore.app.page import models, pictures, request, work
from restore.app.page.pictures import Edits
from restore.app.page.request import Request
from restore.app.page.text import label_versions
from restore.images import io as images
from restore.memory import Planner
from restore.paths import data_dir

PHOTO = data_dir() / "photos" / "astronaut-face-64.png"
SCRATCHED = data_dir() / "photos" / "astronaut-face-64-scratched.png"
MASK = data_dir() / "masks" / "scratches-64.png"
QUICK = {"quality": "fast", "samples": 1, "steps": 2}


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded")


def restored(restorer, photos, wanted, folder, edits=None, mask=None):
    """The Result of each photo."""
    planner = Planner(restorer)
    items = work.restore(photos, planner, wanted, folder, threading.Event(), edits, mask)
    return [item for item in items if isinstance(item, work.Result)]


def test_a_photo_is_restored_as_by_the_command(restorer, tmp_path):
    from restore.app import files
    from restore.app.choice import MethodChoice
    from restore.app.run import RestoreJob
    from restore.task import load_task

    (done,) = restored(restorer, [SCRATCHED], Request("fill", sigma=0.05, **QUICK), tmp_path / "page", mask=MASK)
    photos = files.find_photos([str(SCRATCHED)], tmp_path)
    method = MethodChoice(quality="fast", steps=2)
    (outcome,) = RestoreJob(restorer, load_task("inpaint", mask=MASK), method).run(photos)
    assert done.error is None and done.sidecar["residual_ratio"] == outcome.numbers["residual_ratio"]
    assert done.files[0].read_bytes() == outcome.photo.target.read_bytes()
    assert {path.name for path in done.files} == {SCRATCHED.name, f"{SCRATCHED.stem}.json"}


@pytest.mark.parametrize(
    "wanted",
    [
        Request("enlarge", factor=2, **QUICK),
        Request("sharpen", std=1.0, **QUICK),
        Request("sharpen", blur="motion", path=[[0, 0], [5, 2]], **QUICK),
        Request("denoise", sigma=0.1, **QUICK),
        Request("colour", **QUICK),
    ],
    ids=lambda wanted: f"{wanted.task}-{wanted.blur}",
)
def test_every_task_of_the_page_restores(restorer, tmp_path, wanted):
    (done,) = restored(restorer, [PHOTO], wanted, tmp_path)
    side = 128 if wanted.task == "enlarge" else 64
    assert done.error is None and PIL.Image.open(done.files[0]).size == (side, side)
    assert done.before.size == done.samples[0].size == (384, 384)


def test_three_versions_show_what_is_guesswork(restorer, tmp_path):
    wanted = Request("fill", sigma=0.02, **QUICK | {"samples": 3, "steps": 10})
    (done,) = restored(restorer, [SCRATCHED], wanted, tmp_path, mask=MASK)
    assert len(done.samples) == 3 and len(done.files) == 6
    assert done.sidecar["spread"]["verdict"] == "too narrow"  # DiffPIR with zeta 1: not all equally likely
    assert "differ from them more" in label_versions(done.sidecar["spread"])
    assert label_versions() == label_versions({"verdict": "samples"}) == "Three versions, all equally likely"
    known = np.asarray(PIL.Image.open(MASK).resize(done.guessed.size, PIL.Image.Resampling.NEAREST)) > 127
    red, _, blue = np.moveaxis(np.asarray(done.guessed).astype(float), -1, 0)
    assert (red - blue)[~known].mean() > 5 * abs((red - blue)[known].mean())


def test_messages_hide_folders_and_large_photos_are_refused(restorer, tmp_path):
    broken = tmp_path / "secret" / "a.png"
    broken.parent.mkdir()
    broken.write_bytes(PHOTO.read_bytes()[:200])
    (done,) = restored(restorer, [broken], Request("denoise", **QUICK), tmp_path / "out")
    assert "a.png" in done.error and "secret" not in done.error and "/" not in done.error
    for side, sentence in ((9000, "64 million pixels, got 9000 x 9000"), (20000, "far more than 64 million")):
        PIL.Image.new("1", (side, side)).save(broken)
        (done,) = restored(restorer, [broken], Request("denoise", **QUICK), tmp_path / "out")
        assert sentence in done.error


def test_the_last_answer_says_all(restorer):
    """A browser that passes over an answer, as a busy one does, still gets every result."""
    from restore.app.page.handlers import Handlers
    from restore.app.page.visits import Asked, Visit

    class Parts:
        def updates(self, **changes):
            return changes

    asked = [Asked(str(PHOTO), None, "embedded", Request("denoise", sigma=0.1, **QUICK))] * 2
    visit = Visit()
    *answers, last = Handlers(models.Priors(restorer), Parts())._run(visit, asked, "first")
    results = [answer for answer in answers if "files" in answer]
    assert "2 of 2 photos done" in last["status"] and ["Done." in result["status"] for result in results] == [True]
    assert len(results[0]["files"]["value"]) == 2  # of the first photo; the last one's come once
    assert last["download"]["visible"] and len(last["files"]["value"]) == 4
    visit.leave()


def test_a_queue_goes_on_after_a_bad_photo_and_proposes_damage(restorer, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    hair = tmp_path / "hair.png"
    picture = PIL.Image.open(PHOTO).crop((0, 0, 64, 48)).resize((192, 144), PIL.Image.Resampling.BICUBIC)
    drawn = PIL.Image.new("L", picture.size)
    PIL.ImageDraw.Draw(drawn).line((40, 0, 70, 143), fill=255, width=2)
    picture.paste((250, 250, 245), mask=drawn)
    picture.crop((20, 40, 84, 104)).save(hair)
    painted = np.zeros((64, 64), bool)
    painted[20:24, 20:40] = True
    wanted, edits = Request("fill", sigma=0.05, **QUICK), Edits(mask=painted)
    first, second, third = restored(restorer, [PHOTO, bad, hair], wanted, tmp_path / "out", edits)
    assert first.error is None and "bad.png" in second.error and third.error is None
    masks = [images.read_image(tmp_path / "out" / k / "mask.png").pixels[0, 0].numpy() > 0 for k in "02"]
    assert np.array_equal(~masks[0], painted)
    truth = np.asarray(drawn.crop((20, 40, 84, 104))) > 0
    assert (~masks[1] & truth).sum() > 0.4 * truth.sum()


@pytest.mark.parametrize("task", ["denoise", "sharpen"])
def test_each_photo_of_a_queue_is_measured_by_itself(restorer, tmp_path, task):
    from restore.app.page.handlers import _read_requests

    rng, photos = np.random.default_rng(0), []
    for k, noise in enumerate((4, 50)):
        photos.append(tmp_path / f"{k}.png")
        picture = PIL.Image.open(data_dir() / "photos" / "chelsea.jpg").crop((100, 100, 196, 180))
        array = np.asarray(picture) + rng.normal(0, noise, (80, 96, 3))
        PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(photos[-1])
    typed = {"path": "[]", "pag_scale": "", "steps": "2", "label": "photo", "factor": 2, "seed": 0, "blur": "focus"}
    typed |= {"quality": "fast", "sensitivity": 0.5, "trajectory": False, "extent": 21, "std": 2.5, "noise": 0.06}
    first, others = _read_requests(task=task, sigma="", **typed)
    planner = Planner(restorer)
    run = work.restore(photos, planner, first, tmp_path / "out", threading.Event(), Edits(), others=others)
    done = [item for item in run if isinstance(item, work.Result)]
    assert [each.error for each in done] == [None, None]
    operators = [each.sidecar["settings"]["task"] for each in done]
    sigmas = [operator["noise"]["sigma"] for operator in operators]
    assert sigmas[0] < 0.1 and sigmas[1] == pytest.approx(50 / 127.5, rel=0.15)
    assert sigmas[0] == 0.06 or task != "denoise"  # the slider belongs to the photo that is shown
    if task == "sharpen":
        assert operators[0]["std"] == 2.5 and operators[1]["std"] != 2.5
    same = [each.sigma for each in _read_requests(task=task, sigma="0.2", **typed)]
    assert same == [0.2, 0.2]  # what is typed under Advanced is for all


def test_what_the_photo_needs_is_seen_told_and_done(restorer, tmp_path):
    source = tmp_path / "noisy.png"
    picture = PIL.Image.open(data_dir() / "photos" / "chelsea.jpg").crop((100, 100, 196, 180))
    clean = np.asarray(picture).astype(float)
    noisy = (clean + np.random.default_rng(0).normal(0, 30, clean.shape)).clip(0, 255)
    PIL.Image.fromarray(noisy.astype(np.uint8)).save(source)
    wanted = Request(quality="fast")
    planned = work.estimate(source, Planner(restorer), wanted, tmp_path / "plan")
    (done,) = restored(restorer, [source], wanted, tmp_path / "out")
    assert done.error is None and "noise of" in planned.note and planned.note in done.note
    after = np.asarray(PIL.Image.open(done.files[0]).resize(picture.size)).astype(float)
    assert np.square(after - clean).mean() < 0.5 * np.square(noisy - clean).mean()


@pytest.mark.parametrize("task", ["jpeg", "auto"])
def test_a_jpeg_that_was_turned_and_cropped_is_still_one(restorer, tmp_path, task):
    source, edits = tmp_path / "small.jpg", Edits(turns=1, crop=(0.05, 0.1, 1.0, 0.9))
    PIL.Image.open(PHOTO).convert("RGB").save(source, quality=20, subsampling="4:4:4")
    tables = PIL.Image.open(source).quantization
    (done,) = restored(restorer, [source], Request(task, **QUICK), tmp_path / task, edits)
    found = done.sidecar["settings"]["task"]
    found = found["operators"][-1] if found["name"] == "compose" else found
    assert done.error is None and found["name"] == "jpeg" and found["subsampling"] == "4:4:4"
    assert found["tables"] == [np.reshape(tables[k], (8, 8)).T.ravel().tolist() for k in (0, 1)]
    assert found["offset"] == [round(0.1 * 64) % 8, round(0.05 * 64) % 8]


def test_what_a_turned_file_cannot_say_is_an_error(restorer, tmp_path):
    source, wanted = tmp_path / "small.jpg", Request("jpeg", **QUICK)
    PIL.Image.open(PHOTO).convert("RGB").save(source, quality=20, subsampling="4:2:2")
    (done,) = restored(restorer, [source], wanted, tmp_path / "turned", Edits(turns=1))
    assert "small.jpg" in done.error and "undo" in done.error
    assert restored(restorer, [source], wanted, tmp_path / "twice", Edits(turns=2))[0].error is None


def test_a_person_gets_one_version_of_what_takes_least(restorer):
    assert Request() == Request("auto", factor=2, samples=1, std=None, sigma=None)
    assert next(iter(request.PLAIN)) == Request().task


def test_long_estimates_say_what_takes_less():
    from restore.app.page import text
    from restore.memory import Plan
    from restore.memory.measure import MemoryOptions

    def plan(seconds, samples=1):
        return Plan((3000, 4000), "dpir in 8 steps", samples, 9, 8, seconds, 1, None, MemoryOptions(16))

    short, long = text.format_plan(plan(100), 1), text.format_plan(plan(3600), 2)
    assert "<b>Takes 1 to 3 minutes</b><br>" in short and "Cropped" not in short
    assert "<b>Takes 0.5 to 2 hours</b> for the first photo: the result has 12.0 million pixels" in long
    assert "Cropped to a quarter of its area: 10 to 25 minutes" in long
    assert "They take 2 to 6 hours" in text.format_versions(plan(4 * 3600, 3))


def test_nothing_to_fill_is_an_error(restorer, tmp_path):
    for edits in (Edits(), Edits(mask=np.zeros((64, 64), bool))):
        (done,) = restored(restorer, [PHOTO], Request("fill", **QUICK), tmp_path, edits)
        assert done.error.startswith("paint over what is damaged first")
    PIL.Image.new("RGB", (64, 64), "grey").save(tmp_path / "flat.png")
    (done,) = restored(restorer, [tmp_path / "flat.png"], Request("fill", **QUICK), tmp_path / "out")
    assert "no scratches and no dust" in done.error
    assert restored(restorer, [], Request(), tmp_path)[0].error == "choose a photo first"


def test_turning_and_cropping_keep_the_rest(restorer, tmp_path):
    source = tmp_path / "old.jpg"
    exif = PIL.Image.Exif()
    exif[0x010E] = "grandmother"
    array = np.random.default_rng(0).integers(0, 255, (40, 80, 3)).astype(np.uint8)
    PIL.Image.fromarray(array).save(source, quality=95, exif=exif)
    edits = Edits(turns=1, crop=(0.0, 0.0, 1.0, 0.5))
    (done,) = restored(restorer, [source], Request("denoise", sigma=0.1, **QUICK), tmp_path / "out", edits)
    result = PIL.Image.open(done.files[0])
    assert done.files[0].name == "old.jpg" and result.format == "JPEG" and result.size == (40, 40)
    assert result.getexif()[0x010E] == "grandmother"
    assert done.sidecar["input"] == "old.jpg" and done.sidecar["edited"]["turns"] == 1
    record = pictures.read_photo(source)
    turned = pictures.apply_edits(record, edits).pixels[0]
    assert torch.equal(turned, torch.from_numpy(np.rot90(record.pixels[0].numpy(), -1, (1, 2)).copy())[:, :40])


@pytest.mark.parametrize("edits", [None, Edits(turns=1)], ids=["whole", "turned"])
def test_what_is_not_kept_is_said(restorer, tmp_path, edits):
    PIL.Image.open(PHOTO).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    wanted = Request("denoise", sigma=0.1, **QUICK)
    (done,) = restored(restorer, [tmp_path / "print.jpg"], wanted, tmp_path / "out", edits)
    assert done.sidecar["not_kept"] == ["CMYK colours"] and done.line().endswith("; not kept: CMYK colours")


def test_grey_stays_grey(restorer, tmp_path):
    source = tmp_path / "print.png"
    PIL.Image.open(PHOTO).convert("L").convert("RGB").save(source)
    for task in ("denoise", "colour"):
        (done,) = restored(restorer, [source], Request(task, sigma=0.1, **QUICK), tmp_path / task, Edits(turns=1))
        colours = np.ptp(np.asarray(PIL.Image.open(done.files[0]).convert("RGB")).astype(int), axis=2)
        assert (colours.max() <= 1) == (task == "denoise")


def test_input_from_the_browser_is_validated():
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[1, 2] = 255
    held = io.BytesIO()
    PIL.Image.fromarray(layer).save(held, "PNG")
    mask = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    edits = pictures.parse_edits(json.dumps({"turns": 5, "crop": [0, 0, 0.5, 1], "mask": mask}))
    assert edits.turns == 1 and edits.mask.sum() == 1 and edits.mask[1, 2] and not pictures.parse_edits("").change_photo
    good = {"turns": 0, "crop": [0, 0, 1, 1], "mask": None}
    wrong = [{"turns": "x"}, {"crop": [0, 0, 0, 1]}, {"crop": [0, 0, 2, 1]}, {"crop": 3}, {"mask": "/etc/passwd"}]
    wrong += [{"crop": [float("nan")] * 4}, {"mask": mask[:60]}, {"mask": 7}]
    for text in ["[", "[]", "3", "[" * 100_000, *(json.dumps(good | change) for change in wrong)]:
        with pytest.raises(RestoreError, match="choose the photo again"):
            pictures.parse_edits(text)
    for text in ["{", '{"a": 1}', "[[1]]", "[[NaN, 0]]", "[[2, 0]]", '[["x", 0]]', "[" * 100_000]:
        with pytest.raises(RestoreError, match="draw it again"):
            request.parse_path(text, 20)
    assert request.parse_path("[[0, 0.5]]", 20) == [[0, 10]] and request.parse_path(None, 20) == []
    assert request.parse_path("[[0, 5], [3, -2]]") == [[0, 5], [3, -2]]


def test_a_drawn_path_blurs_along_itself(tmp_path):
    wanted = Request("sharpen", blur="motion", path=[[0, 0], [8, 0], [8, 4]], sigma=0)
    task = request.make_task(wanted, torch.zeros(1, 3, 32, 32), tmp_path)
    point = torch.zeros(1, 3, 32, 32)
    point[..., 16, 16] = 1
    smeared = task.build(32, 32).A(point)[0, 0] > 0.02
    rows, columns = torch.nonzero(smeared, as_tuple=True)
    corner = smeared[rows.min() : rows.min() + 2, columns.max() - 1 : columns.max() + 1]
    assert corner.any() and not smeared[rows.max() - 1 :, : columns.min() + 3].any()


def test_the_prior_is_described(restorer, tmp_path):
    assert models.format_fit(restorer).startswith("This prior knows 64-pixel faces and pieces of photos.")
    plan = work.estimate(PHOTO, Planner(restorer), Request("enlarge", factor=4, **QUICK), tmp_path).plan
    assert "256 × 256 pixels does not fit" in models.format_fit(restorer, plan) and plan.windows == 49

    class Other:
        name, backbone = "sd-1.5", restorer.backbone

    assert models.format_fit(Other).startswith("This prior knows 64-pixel pictures of all kinds.")
    assert "Anything else" not in models.format_fit(restorer) and "Anything else" not in models.format_fit(Other)
    Other.name = "adm-ffhq-256"
    assert "Anything else" in models.format_fit(Other)
    Other.name = "somebody's"
    assert models.format_fit(Other) == "This prior knows 64-pixel pictures."


def test_labels_are_offered_if_the_prior_has_classes(restorer, tmp_path):
    from restore.app.page.handlers import Handlers

    handlers = Handlers(models.Priors(restorer, offline=True))
    choices = [("decide for me", ""), ("face", "face"), ("photo", "photo")]
    offered = [handlers.offer_labels(name) for name in ("embedded", "embedded-latent", "adm-ffhq-256")]
    assert [(each["visible"], each["choices"], each["value"]) for each in offered] == [
        (True, choices, ""),
        (False, [], ""),
        (False, [], ""),
    ]
    results = {}
    for label in ("face", "photo", None):
        wanted = Request("denoise", sigma=0.5, label=label, **QUICK)
        (done,) = restored(restorer, [PHOTO], wanted, tmp_path / str(label))
        results[label] = done.files[0].read_bytes()
        assert done.sidecar["settings"].get("label") == label
    assert len(set(results.values())) == 3


def test_leaving_stops_the_work(restorer, tmp_path):
    stop = threading.Event()
    wanted = Request("denoise", sigma=0.1, quality="fast", samples=1, steps=1000)
    items = work.restore([PHOTO], Planner(restorer), wanted, tmp_path, stop)
    assert any(item.picture for item in iter(lambda: next(items), None) if isinstance(item, work.Step))
    before = threading.active_count()
    items.close()
    assert stop.is_set() and threading.active_count() == before - 1


def test_without_gradio_the_error_names_the_extra(restorer, monkeypatch):
    from restore.app import page

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RestoreError, match=r"install restore-diffusion\[ui\]"):
        page.build_page(restorer)
