"""Priors on the page: what each knows, which is chosen for a photo, and the download of another one."""

import gc
import weakref

import pytest
import torch

import restore
from operators import RestoreError
from restore.app.page import models
from restore.app.page.request import Request
from restore.paths import data_dir


@pytest.fixture(scope="module")
def restorer():
    return restore.load("embedded")


def test_the_prior_is_chosen_for_the_photo(restorer):
    priors = models.Priors(restorer, offline=True)
    chooser = priors.select("chosen", "restore", Request())
    assert (
        chooser is priors.select("chosen", "restore", Request()) is not priors.select("chosen", "estimate", Request())
    )
    assert chooser.only is None or models.is_missing(models.PHOTOS)
    for special in (Request(label="face"), Request(pag_scale=1.0)):
        assert priors.select("chosen", "restore", special).only == "embedded"
    assert priors.select("embedded", "restore", Request()).restorer is restorer


def test_no_more_than_one_other_prior_is_kept(restorer):
    """Nor its planners, nor what chose it; the first one's stay."""
    priors = models.Priors(restorer, offline=True)
    first, chooser = (priors.select(name, "estimate", Request()) for name in ("embedded", "chosen"))
    chosen = weakref.ref(chooser.choose(torch.zeros(1, 3, 128, 128), (128, 128)).restorer)
    planned = weakref.ref(priors.select(models.PHOTOS, "restore", Request()).restorer)
    assert chosen() is planned() is priors.get(models.PHOTOS)
    del chooser
    latent = priors.select("embedded-latent", "restore", Request())
    gc.collect()
    assert chosen() is None and set(priors.loaded) == {"embedded", "embedded-latent"}
    assert priors.select("embedded-latent", "restore", Request()) is latent
    assert priors.select("embedded", "estimate", Request()) is first


def test_a_prior_that_was_named_is_selected(restorer, monkeypatch, command):
    assert models.Priors(restorer).default == "chosen"
    named = models.Priors(restorer, named=True)
    assert named.default == "embedded" and [name for _, name in named.choices()][:2] == ["chosen", "embedded"]
    opened = []
    monkeypatch.setattr("restore.app.page.serve.serve", lambda load, building, **_: opened.append(building["named"]))
    for arguments in (["ui"], ["ui", "--backbone", "embedded"]):
        assert command(*arguments)[0] == 0
    assert opened == [False, True]


@pytest.mark.parametrize("native", [True, False])
def test_the_page_computes_photos_in_what_the_processor_has(restorer, monkeypatch, command, native):
    monkeypatch.setattr("restore.backbones.precision.has_native_bf16", lambda device=None: native)
    opened = []
    monkeypatch.setattr("restore.app.page.serve.serve", lambda load, building, **_: opened.append(building))
    for arguments in (["ui"], ["ui", "--precision", "fp32"]):
        assert command(*arguments)[0] == 0
    photos = [models.Priors(restorer, **building).get(models.PHOTOS).backbone.dtype for building in opened]
    assert photos == [torch.bfloat16 if native else torch.float32, torch.float32]


def test_priors_are_described_and_downloaded(restorer, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    priors = models.Priors(restorer, offline=True)
    names = [name for _, name in priors.choices()]
    assert (
        names[:2] == ["chosen", "embedded"]
        and "adm-ffhq-256" in names
        and not {"taesd", "adm-imagenet-64"} & set(names)
    )
    text = models.describe_prior("adm-ffhq-256")
    assert "CC BY-NC-SA 4.0" in text and "374 MB" in text and "not on this machine yet" in text
    assert "2.2 GB" in models.describe_prior("adm-imagenet-256") and "comes with the package" in models.describe_prior(
        "embedded"
    )
    with pytest.raises(RestoreError, match="this page is offline"):
        priors.fetch("adm-ffhq-256", lambda *_: None)
    with pytest.raises(RestoreError, match="download it first"):
        priors.get("adm-ffhq-256")
    for name in ("/etc/passwd", str(data_dir() / "embedded"), "taesd", "owner/name"):
        with pytest.raises(RestoreError, match="no prior called"):
            priors.get(name)
        with pytest.raises(RestoreError, match="no prior called"):
            priors.fetch(name, lambda *_: None)
    with pytest.raises(RestoreError, match="open to others"):
        models.Priors(restorer, fetching=False).fetch("adm-ffhq-256", lambda *_: None)
    assert priors.get(None) is priors.get("embedded") is restorer


@pytest.mark.slow
def test_a_download_without_connection_fails_in_one_sentence(restorer, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(RestoreError, match="could not be downloaded.*models pull adm-ffhq-256") as caught:
        models.Priors(restorer).fetch("adm-ffhq-256", lambda *_: None)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)
