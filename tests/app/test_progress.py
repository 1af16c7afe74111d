"""The bar in the terminal: what is done and how long the rest takes, also within a step of a large photo."""

import re
import threading

import pytest
import torch

import restore
from operators import RestoreError
from restore.app.progress import PhotoPace, Progress, watch_network
from restore.memory import Plan
from restore.memory.measure import MemoryOptions


def make_plan(windows=64, evaluations=8, samples=1, seconds=100.0):
    return Plan((64, 64), "", samples, windows, evaluations, seconds, 0, None, MemoryOptions(16))


@pytest.mark.parametrize("samples, batch", [(1, 1), (3, 1), (4, 2)])
def test_calls_count_within_a_step_and_steps_are_right(samples, batch):
    pace, shares = PhotoPace(make_plan(samples=samples), batch), []
    calls = 4 * batch  # 64 windows of `batch` samples, 16 in a call
    for first in range(0, samples, batch):
        for step in range(4):  # of two evaluations
            for _ in range(2 * calls):
                pace.count_call()
                shares.append(pace.share)
            pace.count_step({"first": first, "total": samples, "count": batch, "step": step, "steps": 4})
            done = (first + batch * (step + 1) / 4) / samples
            assert pace.share == pytest.approx(done) and pace.share >= shares[-1]
    assert shares == sorted(shares) and len(set(shares)) > 0.8 * len(shares) and pace.share == 1


def test_a_wrong_plan_and_none_never_go_beyond_the_next_step():
    for evaluations in (1, 1000):
        pace = PhotoPace(make_plan(evaluations=evaluations))
        for step in range(4):
            for _ in range(8):
                pace.count_call()
            assert pace.share < (step + 1) / 4 or step == 0
            pace.count_step({"first": 0, "total": 1, "count": 1, "step": step, "steps": 4})
            assert pace.share == (step + 1) / 4
    assert PhotoPace().left() is None


def test_the_network_is_watched_and_left_as_it_was():
    backbone, calls = restore.load("embedded").backbone, []
    x = torch.zeros(1, 3, 64, 64)
    with watch_network(backbone, lambda: calls.append(1)):
        backbone.predict(x, 10)
    backbone.predict(x, 10)
    assert len(calls) == 1
    with watch_network(object(), lambda: calls.append(1)):
        pass


def test_a_network_that_another_thread_runs_is_none_of_ours():
    """On the page, the estimate of one visitor neither counts for the photo of another nor is cancelled with it."""
    backbone, calls, failed = restore.load("embedded").backbone, [], []

    def called():
        calls.append(threading.get_ident())
        raise RestoreError("cancelled")

    def estimate():
        try:
            backbone.predict(torch.zeros(1, 3, 64, 64), 10)
        except RestoreError as error:
            failed.append(error)

    with watch_network(backbone, called):
        other = threading.Thread(target=estimate)
        other.start()
        other.join()
        assert not failed and not calls
        estimate()
    assert len(failed) == 1 and calls == [threading.get_ident()]


def test_the_command_says_how_long_the_rest_takes(tmp_path, capsys, monkeypatch):
    import PIL.Image

    from restore.app import cli

    monkeypatch.setattr(Progress, "DELAY", 0.0)
    for name in ("a.png", "b.png"):
        PIL.Image.effect_noise((96, 80), 40).convert("RGB").save(tmp_path / name)
    arguments = ["restore", "run", str(tmp_path), "--task", "denoise", "--backbone", "embedded", "--sampler", "diffpir"]
    monkeypatch.setattr("sys.argv", [*arguments, "--steps", "4", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = capsys.readouterr().err
    shares = [int(share) for share in re.findall(r"(\d+)%\|", said)]
    assert shares == sorted(shares) and max(shares) >= 90 and len(set(shares)) >= 4
    assert re.search(r"(seconds|minutes?) left for photo [12] of 2", said) and "residual=" in said
    assert re.search(r"about [\d.]+( to [\d.]+)? (seconds|minutes),", said)
