"""A report about somebody else's run imports nothing, embeds no file from outside of it, and shows text as text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from operators import RestoreError, naming
from restore.bench.run import run_benchmark
from restore.config import read_config, read_yaml
from restore.report.write import to_markdown, write_report

NOISE = {"name": "gaussian", "sigma": 0.05}
NASTY = 'A <script>alert(1)</script> [link](http://evil.example) ![i](x.png) **b** `c` a|b\n# head "q"'


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(3, 16, 0))
    tasks = {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}}
    data = {"folder": str(tmp_path / "photos")}
    methods = {"base": {"sampler": "baseline"}, "dps": {"sampler": "dps", "steps": 1, "parameters": {"zeta": 0.5}}}
    return {**tiny_run, "data": data, "tasks": tasks, "methods": methods}


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_nothing_that_a_run_names_is_imported(config, tmp_path, monkeypatch):
    """Neither a metric that is recorded with how it is shown nor another; nor samplers and operators."""
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef f(a, b): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(naming, "MODULE_FOLDERS", [str(tmp_path)])
    run = run_benchmark(config).folder

    def change(manifest):
        manifest["config"]["metrics"]["names"] += ["evil_module:f"]
        manifest["config"]["report"] |= {"columns": ["psnr", "evil_module:f"], "curve": ["evil_module:f", "psnr"]}
        manifest["config"]["methods"]["dps"]["sampler"] = "evil_module:f"
        manifest["config"]["methods"]["dps"]["swept"] = {"scale": 1.0}
        manifest["config"]["tasks"]["sr"]["operator"]["name"] = "evil_module:f"

    edit(run / "run.json", change)
    text = write_report([run]).markdown.read_text()
    assert "evil_module:f" in text and not (tmp_path / "executed").exists() and "evil_module" not in sys.modules
    edit(run / "metrics.json", lambda m: m["shown"].update({"evil_module:f": ["Evil", 1, 2, "recorded"]}))
    assert "Evil ↑" in write_report([run]).markdown.read_text() and "evil_module" not in sys.modules


@pytest.mark.parametrize("level", ["task", "method"])
def test_pictures_from_outside_of_the_run_are_not_embedded(config, level):
    run = run_benchmark(config).folder

    def change(metrics):
        table = metrics["table"]
        if level == "task":
            table["../../photos"] = table["sr"]
        else:
            table["sr"]["../../../photos"] = table["sr"]["base"]

    edit(run / "metrics.json", change)
    with pytest.raises(RestoreError, match="file name without folders"):
        write_report([run])


def test_text_is_shown_as_text(config):
    config |= {"title": NASTY, "source": NASTY, "notes": [NASTY], "report": {"pictures": 2}}
    config["tasks"]["sr"]["title"] = config["methods"]["dps"]["title"] = NASTY
    config["published"] = {"titles": {"paper": NASTY}, "values": {"paper": {"sr": {"psnr": 20.0}}}}
    written = write_report([run_benchmark(config).folder])
    page, text = written.html.read_text(), written.markdown.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(http", text) and not re.search(r"(?<!\\)\*\*b", text)
    assert len(re.findall(r"(?m)^# ", text)) == 1  # the title's; none that a text put there
    for line in text.splitlines():  # tables keep their columns
        if line.startswith("| A"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 9), line


@pytest.mark.parametrize(
    "text, shown",
    [
        ("sigma_y = 0.05 on [-1, 1]", "sigma_y = 0.05 on [-1, 1]"),
        ("DPS + PAG, s = 1.0 (i9)", "DPS + PAG, s = 1.0 (i9)"),
        ("-0.03", "-0.03"),
        ("_a_ snake_case", r"\_a\_ snake_case"),
        ("a\n\n# b", "a # b"),
        ("# b", r"\# b"),
        ("2. b", r"2\. b"),
        ("- b", r"\- b"),
        ("[a](b) [a]: b", r"[a\](b) [a\]: b"),
        ("&lt;x> & <y>", "&amp;lt;x> & &lt;y>"),
        ("\\| `", "\\\\\\| \\`"),
        (0.5, "0.5"),
    ],
)
def test_markdown_is_escaped(text, shown):
    assert to_markdown(text) == shown


def test_pictures_that_changed_since_are_told_and_not_shown(config):
    run = run_benchmark(config).folder
    assert "changed since" not in write_report([run]).markdown.read_text()
    (run / "results/sr/base/00001.png").write_bytes((run / "truth/00001.png").read_bytes())
    written = write_report([run])
    assert "changed since they were measured: base, sr: 1 of 3 images (00001)" in written.html.read_text()
    assert "of 00001" not in written.html.read_text() and "of 00002" in written.html.read_text()


@pytest.mark.parametrize(
    "content",
    [
        {"title": "${oc.env:SECRET}"},
        {"title": "${ oc.env : SECRET }"},
        {"notes": ["x", "${oc.decode:'${oc.env:SECRET}'}"]},
        {"name": "env", "title": "${oc.${name}:SECRET}"},
        {"name": "oc.", "source": "env", "title": "${oc.create:'{z: \"\\${${name}${source}:SECRET}\"}'}"},
        {"name": "$", "source": "{oc.env:SECRET}", "title": "${name}${source}"},
    ],
)
def test_a_configuration_cannot_read_the_environment(content, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(RestoreError, match="(title|notes.1) must not have .*only references to other keys"):
        read_config(content, [], "benchmark")
    (tmp_path / "file.yaml").write_text(json.dumps(content))
    for read in (lambda path: read_config(path, [], "benchmark"), read_yaml):
        with pytest.raises(RestoreError, match="only references to other keys"):
            read(tmp_path / "file.yaml")
    with pytest.raises(RestoreError, match="only references"):
        read_config({"title": "x"}, ["title=${oc.env:SECRET}"], "benchmark")


def test_references_to_other_keys_are_resolved():
    content = {"a": {"b": 2}, "c": "${a.b}", "d": "x ${c}", "key": "b", "e": "${a.${key}}", "f": "100 % {a:b} $"}
    assert read_config(content, [], "benchmark") == {**content, "c": 2, "d": "x 2", "e": 2}
