"""Pictures and charts as the papers lay them out: a row for each method, and a value for each layer."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from restore.bench.run import run_benchmark
from restore.report import figures, tables
from restore.report.write import write_report


@pytest.fixture
def samples(tiny_run):
    """Samples of a tiny prior, whose network has the layers i3, m1, o0 and o1."""
    plain = {"sampler": "ddim", "steps": "ddim2"}
    pag = {**plain, "title": "PAG", "guidance": {"pag": {"scale": 1.0}}}
    return {
        **tiny_run,
        "kind": "generation",
        "tasks": {"uncond": {"title": "Samples", "count": 3}},
        "methods": {"none": {**plain, "title": "no guidance"}, "pag": pag},
        "metrics": {"names": ["seconds_per_image"]},
    }


def test_a_row_for_each_method_with_the_same_noise(samples):
    """All seven, also of a long sweep, with an image in each column."""
    samples["methods"]["pag"]["guidance"]["pag"]["layers"] = ["m1"]
    samples["methods"]["pag"]["sweep"] = {"guidance.pag.scale": [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0]}
    samples["report"] = {"layout": "rows", "pictures": 2}
    done = run_benchmark(samples)
    page = write_report([done.folder]).html.read_text()
    heads = re.findall(r"<th>([^<]*)</th>", page[page.index('<table class="pictures">') :].split("</table>")[0])
    assert heads == ["", "000000", "000001", "no guidance", *(f"PAG, scale {s:.1f}" for s in (0, 1, 3, 7, 15, 31, 63))]
    assert page.count("<img") == 8 * 2
    uris = re.findall(r'<img src="([^"]+)"', page)
    folder = done.folder / "results/uncond"
    assert uris[:2] == [figures.to_data_uri(folder / "none" / f"00000{i}.png") for i in (0, 1)]
    assert uris[2:4] == uris[:2]  # scale 0 from the same noise


def test_a_value_for_each_layer(samples, monkeypatch):
    """As PAG's Figures 38 and 40; sets of several sizes over their number, with the mean of each, as its Figure 39."""
    samples["methods"]["pag"]["sweep"] = {"guidance.pag.layers": [["i3"], ["m1"], ["o0"]]}
    done = run_benchmark(samples)
    (chart,) = tables.build_charts(tables.read_run(done.folder))
    (line,) = chart["series"]
    assert chart["x"] == "layer" and chart["ticks"] == {0: "i3", 1: "m1", 2: "o0"}
    values = [done.table["table"]["uncond"][f"pag_layers={n}"]["cost"]["seconds_per_image"] for n in ("i3", "m1", "o0")]
    assert [point[:2] for point in line["points"]] == list(enumerate(values))
    assert [text for _, text in figures.place_chart(chart)["x_ticks"]] == ["i3", "m1", "o0"]

    samples["methods"]["pag"]["sweep"] = {"guidance.pag.layers": [["i3"], ["m1"], ["i3", "m1"]]}
    done = run_benchmark({**samples, "out": f"{samples['out']}-sets"})
    (chart,) = tables.build_charts(tables.read_run(done.folder))
    sets, mean = chart["series"]
    cells = done.table["table"]["uncond"]
    values = [cells[f"pag_layers={n}"]["cost"]["seconds_per_image"] for n in ("i3", "m1", "i3+m1")]
    assert chart["x"] == "number of layers" and [p[:2] for p in sets["points"]] == list(
        zip((1, 1, 2), values, strict=True)
    )
    assert [p[:2] for p in mean["points"]] == [(1, pytest.approx(sum(values[:2]) / 2)), (2, values[2])]
    assert write_report([done.folder]).html.read_text().count("<polyline") == 1


def test_large_pictures_are_reduced(tmp_path):
    """Those of 512 pixels would make reports of tens of megabytes; others are embedded as they are."""
    gradient = np.linspace(0, 255, 512, dtype=np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    Image.fromarray(gradient).save(tmp_path / "large.png")
    uri = figures.to_data_uri(tmp_path / "large.png", 256)
    small = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int)
    assert small.shape == (150, 256, 3) and abs(small[75, :, 0] - np.linspace(0, 255, 256)).max() <= 2
    Image.fromarray(gradient[:256, :256]).save(tmp_path / "fits.png")
    assert figures.to_data_uri(tmp_path / "fits.png", 256) == figures.to_data_uri(tmp_path / "fits.png")


def test_columns_of_a_list_of_classes_have_their_names(samples):
    run = tables.Run(None, {"tasks": {"cond": {"labels": [32, 317]}, "uncond": {"labels": None}}}, {}, {})
    assert [run.image_title("cond", f"{i:06d}") for i in range(3)] == [
        "000000, class 32",
        "000001, class 317",
        "000002, class 32",
    ]
    assert run.image_title("uncond", "000001") == "000001"
