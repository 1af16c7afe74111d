from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.report import figures, tables
from restore.report.write import write_report

NOISE = {"name": "gaussian", "sigma": 0.05}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(4, 16, 0))
    steps = {"sampler": "dps", "steps": 2, "parameters": {"zeta": 0.5}}
    return {
        **tiny_run,
        "title": "A <small> run",
        "source": "Nobody's paper",
        "notes": ["Random weights."],
        "batch": 4,
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"sr": {"title": "SR x4", "operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "methods": {
            "base": {"title": "Bicubic", "sampler": "baseline"},
            "dps": {"title": "DPS", **steps},
            "pag": {
                "title": "DPS + PAG",
                **steps,
                "guidance": {"pag": {"layers": ["m1"]}},
                "sweep": {"guidance.pag.scale": [1, 3]},
            },
        },
        "published": {
            "source": "Table 9",
            "titles": {"sag": "SAG"},
            "values": {"dps": {"sr": {"psnr": 22.75}}, "sag": {"sr": {"psnr": 21.5}}},
        },
    }


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        """Nothing to close."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_run(config):
    run_benchmark(config)
    written = write_report([config["out"]])
    page, text = written.html.read_text(), written.markdown.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.addresses
    assert all(a.startswith("data:image/png;base64,") for a in parser.addresses), "not self-contained"
    assert "A &lt;small&gt; run" in page and "<small>" not in page
    for part in ("Random weights.", "Nobody", "SAG", "published 22.75", "published 21.5", "sigma_y = 0.05 on [-1, 1]"):
        assert part in page and part in text, part
    # measurement, four methods and truth, for each of four images
    assert page.count("<img") == 4 * 6
    assert page.count("<svg") == 1 and page.count("<polyline") == 1 and page.count("<circle") == 2
    row = next(line for line in text.splitlines() if line.startswith("| Bicubic"))
    assert re.search(r"\*\*\d+\.\d\d\*\* \(\d+\.\d\d–\d+\.\d\d\)", row)
    assert "| images.sha256 |" in text and "| tasks.sr.sigma_y | 0.05 |" in text


def test_quality_per_second_over_a_sweep_of_steps(config):
    """One chart per metric, a line per method from few to many evaluations, each point with their number."""
    plain = config["methods"]["dps"]
    config["methods"] = {"dps": {**plain, "sweep": {"steps": ["ddim2", "ddim5"]}}, "pag": config["methods"]["pag"]}
    config["methods"]["pag"].update(sweep={"steps": [1, 2]}, guidance={"pag": {"layers": ["m1"], "scale": 1.0}})
    config["report"] = {"curve": ["seconds_per_image", "psnr", "ssim"]}
    run_benchmark(config)
    charts = tables.build_charts(tables.read_run(config["out"]))
    assert [(chart["x"], chart["y"]) for chart in charts] == [
        ("Seconds/image ↓", "PSNR ↑"),
        ("Seconds/image ↓", "SSIM ↑"),
    ]
    lines = {line["name"]: [point[2] for point in line["points"]] for line in charts[0]["series"]}
    assert lines == {"DPS": ["2", "5"], "DPS + PAG": ["2", "4"]}
    assert all(point[0] > 0 for chart in charts for line in chart["series"] for point in line["points"])
    assert write_report([config["out"]]).html.read_text().count("<polyline") == 4


def test_incomplete_cells_say_so_and_are_never_best(config):
    from restore.bench import results
    from restore.bench.batches import load_images
    from restore.bench.config import load_config

    run_benchmark(config)
    (Path(config["out"]) / "results/sr/base/rows/00001.json").unlink()
    checked = load_config(config)
    results.write_metrics(Path(config["out"]), checked, load_images(checked))
    page = write_report([config["out"]]).html.read_text()
    assert "3 of 4" in page and "Incomplete: Bicubic, SR x4: 3 of 4 images; 1 missing." in page
    row = re.search(r"<tr><th>Bicubic</th>(.*?)</tr>", page).group(1)
    assert "<strong>" not in row


def test_runs_with_one_protocol_share_a_table(config, tmp_path):
    run_benchmark(config)
    other = dict(config, title="More scales", out=str(tmp_path / "other"))
    other["methods"] = {"pag5": {**config["methods"]["dps"], "guidance": {"pag": {"scale": 5.0, "layers": ["m1"]}}}}
    run_benchmark(other)
    written = write_report([config["out"], other["out"]], tmp_path / "both")
    assert written.differences == [] and written.html.parent == tmp_path / "both"
    page = written.html.read_text()
    assert page.count('class="results"') == 1 and "More scales: DPS" in page


def test_runs_with_different_protocols_are_kept_apart_and_say_how(config, tmp_path):
    run_benchmark(config)
    other = dict(config, title="Noisier", out=str(tmp_path / "other"))
    run_benchmark(other, ["tasks.sr.operator.noise.sigma=0.1"])
    written = write_report([config["out"], other["out"]], tmp_path / "both")
    assert [set(d.values) for d in written.differences] == [{"tasks.sr.operator.noise.sigma", "tasks.sr.sigma_y"}]
    page, text = written.html.read_text(), written.markdown.read_text()
    assert page.count('class="results"') == 2 and "cannot share a table" in page
    assert "| tasks.sr.sigma_y | 0.05 | 0.1 |" in text


def test_pictures_can_be_left_out(config):
    run_benchmark(config)
    assert "<img" in write_report([config["out"]]).html.read_text()
    assert "<img" not in write_report([config["out"]], private=True).html.read_text()
    run_benchmark(config, ["report.pictures=0"])  # one run's only, for a report about several
    page = write_report([config["out"]]).html.read_text()
    assert "<img" not in page and "Pictures" not in page


def test_folders_without_a_run(tmp_path):
    with pytest.raises(RestoreError, match="holds no benchmark"):
        write_report([tmp_path])
    with pytest.raises(RestoreError, match="at least one run"):
        write_report([])


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (21.3, 21.9), (-4.0, 1200.0), (3.0, 3.0), (0.0, 0.0), (1e-5, 9e-5)])
def test_axes_cover_their_data_with_few_round_ticks(low, high):
    values = figures.choose_ticks(low, high)
    assert 3 <= len(values) <= 9 and values[0] <= low and values[-1] >= high
    steps = {round((b - a) / (values[1] - values[0]), 6) for a, b in zip(values, values[1:], strict=False)}
    assert steps == {1.0}


def test_numbers():
    assert tables.format_number(None, 2) == "—" and tables.format_number(float("nan"), 2) == "—"
    assert tables.format_number(float("inf"), 2) == "∞" and tables.format_number(3.14159, 3) == "3.142"


def test_a_deviation_over_subsets_that_are_the_whole_set_is_not_shown():
    entry = {"done": 16, "expected": 16, "means": {}, "set_values": {"kid": 0.0155, "kid_std": 1e-9}, "cost": {}}
    assert tables.make_cell(entry, "kid").low is None
    entry["set_values"] = {"kid": 0.0004, "kid_std": 3e-7}  # rounding beside a distance of nearly nothing
    assert tables.make_cell(entry, "kid").low is None
    entry["set_values"] = {"kid": 0.0155, "kid_std": 0.004}
    assert tables.make_cell(entry, "kid").low == 0.0115


def test_kernel_distances_to_a_full_reference_are_reported_with_their_deviation(tmp_path):
    """Their standard deviations are no metrics of their own: `full_kid_vgg16_std` is not looked up."""
    values = {"kid_vgg16": 0.02, "kid_vgg16_std": 0.001, "full_kid_vgg16": 0.03, "full_kid_vgg16_std": 0.002}
    entry = {"done": 9, "expected": 9, "means": {}, "set_values": values, "cost": {}}
    config = {
        "report": {"columns": None},
        "metrics": {"names": ["kid_vgg16"]},
        "published": {"values": {}, "titles": {}},
    }
    config |= {"title": "t", "name": "n", "tasks": {"sr": {"title": "SR"}}, "methods": {"dps": {"title": "DPS"}}}
    run = tables.Run(tmp_path, config, {}, {"sr": {"dps": entry}})
    assert run.columns == ["kid_vgg16", "full_kid_vgg16"]
    ((_, cells),) = tables.build_results_table([run]).rows
    cell = cells["sr", "full_kid_vgg16"]
    assert (cell.value, cell.low, cell.high) == (0.03, 0.03 - 0.002, 0.03 + 0.002)
    assert run.find_metric("full_kid_vgg16").label == "KID-VGG16 (full set)"
