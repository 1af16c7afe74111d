"""Priors, head sets and guiders on a hub that is a server on this machine, in one process that knows it as the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import restore
from tests.zoo.hub_server import TOKEN, serving

ROOT = Path(__file__).parents[2]

TABLE = {
    "name": "tiny",
    "objective": "lpips",
    "none": {"cost": 0.3},
    "rounds": [{"ranking": [{}] * 8, "chosen": [["b1", 0], ["b1", 3]]}, {"ranking": [], "chosen": [["b0", 1]]}],
    "curve": [{"size": 1, "scale": 2.0, "cost": 0.25}, {"size": 2, "scale": 2.0, "cost": 0.2}],
    "best": {"size": 2, "scale": 2.0, "heads": ["b1:0,3"]},
}
CODE = """
import json, os, sys, time
from pathlib import Path
import torch
import restore
from restore import RestoreError, Restorer
from restore.guidance import build_guidance
from restore.integrations.diffusers import Guider
from restore.search import SearchResult

adm, token, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
time.sleep = lambda seconds: None  # before the client tries again

def refusal(action):
    try:
        action()
    except RestoreError as error:
        assert "\\n" not in str(error), error
        return str(error)
    raise AssertionError("was not refused")

def weights(restorer):
    return restorer.backbone.network.state_dict()

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

said = {}
prior = restore.load(adm, device="cpu")
said["wrong token"] = refusal(lambda: prior.push_to_hub("owner/tiny", token="hf_wrong"))
said["wrong name"] = refusal(lambda: prior.push_to_hub("owner/tiny/more", token=token))
said["address"] = prior.push_to_hub("owner/tiny", token=token, private=True, commit_message="the first")
found = Restorer.from_pretrained("owner/tiny", token=token, device="cpu")
assert same(weights(found), weights(prior)) and found.backbone.trained_schedule == prior.backbone.trained_schedule
said["private"] = refusal(lambda: Restorer.from_pretrained("owner/tiny", token=False, cache_dir=folder / "empty"))
said["no revision"] = refusal(lambda: Restorer.from_pretrained("owner/tiny", token=token, revision="v2"))

from huggingface_hub import HfApi
HfApi(token=token).create_branch("owner/tiny", branch="v2")
with torch.no_grad():
    next(prior.backbone.network.parameters()).mul_(0.5)  # what is pushed is the network, not the file it came from
prior.push_to_hub("owner/tiny", token=token, branch="v2")
found = Restorer.from_pretrained("owner/tiny", token=token, revision="v2", device="cpu")
assert same(weights(found), weights(prior))
assert not same(weights(Restorer.from_pretrained("owner/tiny", token=token, device="cpu")), weights(prior))

json.dump(said, open(folder / "said.json", "w"))
print("break", flush=True), sys.stdin.readline()
said["interrupted"] = refusal(lambda: prior.push_to_hub("owner/cut", token=token))
print("mend", flush=True), sys.stdin.readline()
prior.push_to_hub("owner/cut", token=token)
assert same(weights(restore.load("owner/cut", device="cpu")), weights(prior))  # public, by its name alone

embedded = restore.load("embedded", device="cpu")
embedded.save_pretrained(folder / "embedded")
assert same(weights(restore.load(folder / "embedded", device="cpu")), weights(embedded))
size = (folder / "embedded" / "diffusion_pytorch_model.safetensors").stat().st_size
said["embedded"] = [size, sorted(path.name for path in (folder / "embedded").iterdir())]

os.chdir(folder)
exec(Path("example.py").read_text())  # as the page has it
assert same(weights(restorer), weights(restore.load(adm, device="cpu"))) and guidance.terms[0].layers == ("b1:0,3",)
heads = SearchResult.from_pretrained("runs/heads-sd3-general")
assert heads.heads == found.heads == [("b1", 0), ("b1", 3)]
assert found.guidance == heads.guidance and found.table == heads.table
guider = Guider(found.guidance, guidance_scale=3.0)
assert guider.guidance == build_guidance(heads.guidance)
said["guider, wrong token"] = refusal(lambda: guider.push_to_hub("owner/guider", token="hf_wrong"))
guider.push_to_hub("owner/guider", token=token)
found = Guider.from_pretrained("owner/guider")
assert found.guidance == guider.guidance and found.guidance_scale == 3.0
Path("runs/heads-sd3-general/guidance.yaml").write_text("- pag: {scale: 1.0, layers: b1, target: 'os:getcwd'}")
said["code"] = refusal(lambda: SearchResult.from_pretrained("runs/heads-sd3-general"))
json.dump(said, open(folder / "said.json", "w"))
"""


def test_only_pictures_of_the_model_card_are_shared(tmp_path, tiny_adm):
    """A model's folder may hold photos, restored or to be restored, which are nobody else's business."""
    folder = shutil.copytree(tiny_adm, tmp_path / "mine")
    for name in ("samples.png", "family.png", "out/family.png", "out/samples.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "README.md").write_text("# Mine\n\n![samples](samples.png), made as ![these](out/family.png)\n")
    restore.load(folder, device="cpu").save_pretrained(tmp_path / "shared")
    found = {path.relative_to(tmp_path / "shared").as_posix() for path in (tmp_path / "shared").rglob("*")}
    assert {name for name in found if name.endswith(".png")} == {"samples.png"} and "out" not in found
    assert (tmp_path / "shared" / "samples.png").read_bytes() == b"samples.png"


def test_pushed_and_pulled(tmp_path, tiny_adm):
    search = tmp_path / "runs" / "heads-sd3-general"
    search.mkdir(parents=True)
    (search / "search.json").write_text(json.dumps(TABLE))
    (search / "guidance.yaml").write_text("- pag: {scale: 2.0, layers: ['b1:0,3'], scope: joint}")
    (tmp_path / "my-prior").symlink_to(tiny_adm)
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "example.py").write_text(example)
    with serving() as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        settings |= {"HF_HUB_OFFLINE": "0", "RESTORE_OFFLINE": "0", "RESTORE_CACHE": str(tmp_path / "cache")}
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(tiny_adm), TOKEN, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if line.strip() == "break":
                hub.breaks = 100
            elif line.strip() == "mend":
                hub.breaks = 0
                assert not hub.repos["owner/cut"]["branches"]["main"]  # nothing of the interrupted upload
            else:
                continue
            process.stdin.write("go\n")
            process.stdin.flush()
        assert process.wait() == 0, process.stderr.read() + str(hub.unknown)
    said = json.loads((tmp_path / "said.json").read_text())
    for case in ("wrong token", "private", "guider, wrong token"):
        assert "owner/" in said[case] and "Invalid username or password" in said[case] and "token=" in said[case]
    assert "more" in said["wrong name"] and "v2" in said["no revision"]
    assert "owner/cut could not be pushed" in said["interrupted"]
    assert "os:getcwd" in said["code"]
    assert "/owner/tiny/" in said["address"]
    tiny, heads = hub.repos["owner/tiny"], hub.repos["owner/heads"]["branches"]["main"]
    assert tiny["private"] and tiny["messages"][0] == "the first" and not hub.repos["owner/cut"]["private"]
    files = tiny["branches"]["main"]
    assert set(files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "restore.json"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: restore-diffusion\n") and "prior of pixels, 16 pixels" in card
    assert set(heads) == {"README.md", "guidance.yaml", "search.json"} and b"b1:0,3, scale 2" in heads["README.md"]
    assert set(hub.repos["owner/guider"]["branches"]["main"]) == {"README.md", "guider_config.json"}
    size, names = said["embedded"]
    assert names == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "restore.json", "samples.png"]
    assert size < 12e6  # in fp16, as it is shipped
    assert (tmp_path / "embedded" / "README.md").read_text().startswith("---\n")
