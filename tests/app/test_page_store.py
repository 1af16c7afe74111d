"""What visitors upload is readable by the page's user alone, and gone once the page is, however it ends."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restore.app.page import store
from restore.paths import data_dir

ROOT = Path(__file__).parents[2]
PHOTO = data_dir() / "photos" / "astronaut-face-64.png"
HOLD = "from restore.app.page.store import open_store; print(open_store(), flush=True); input()"
UI = "from restore.app.cli import main; main()"
UPLOADED = 90  # seconds: the machine may be busy

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and locks")


def start(code, place, *arguments):
    place.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, cwd=ROOT, **pipes)


def test_a_killed_page_is_cleaned_up_by_the_next_and_a_living_one_is_not(tmp_path):
    os.umask(os.umask(0o022))
    killed, living = start(HOLD, tmp_path), start(HOLD, tmp_path)
    left, kept = (Path(process.stdout.readline().strip()) for process in (killed, living))
    assert left != kept and all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in (left, kept))
    (left / "secret.png").write_bytes(b"uploaded")
    (tmp_path / f"{store.PREFIX}link").symlink_to(ROOT)
    others = tmp_path / "gradio" / "somebody.png"
    others.parent.mkdir()
    others.write_bytes(b"not ours")
    killed.kill()
    killed.wait()
    assert (left / "secret.png").exists()
    again = start(HOLD, tmp_path)
    folder = Path(again.stdout.readline().strip())
    assert not left.exists() and kept.is_dir() and folder.is_dir() and others.exists() and ROOT.is_dir()
    for process, own in ((living, kept), (again, folder)):
        process.communicate("\n", timeout=UPLOADED)
        assert process.returncode == 0 and not own.exists()


def test_the_first_line_comes_before_anything_heavy():
    code = "import sys; from restore.app.page import serve; assert not {'torch', 'gradio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)


def test_a_port_in_use_is_one_sentence():
    import socket

    from typer.testing import CliRunner

    from restore.app import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(cli.app, ["ui", "--port", str(taken.getsockname()[1])])
    assert result.exit_code and "port=" in str(result.exception) and "must be free" in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_uploads_and_results_are_private_and_removed_with_the_page(tmp_path, number):
    import gradio_client

    place = tmp_path / "temporary"
    page = start(UI, place, "ui", "--port", str(_free_port()))
    began = time.monotonic()
    lines = [page.stderr.readline()]
    assert "starting the page" in lines[0] and time.monotonic() - began < UPLOADED / 3
    while " http" not in lines[-1]:
        lines.append(page.stderr.readline())
        assert lines[-1], "".join(lines)
    address = lines[-1].split("page is at ")[1].split()[0]
    client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path / "got"))
    photo = gradio_client.handle_file(str(PHOTO))
    client.predict(photo=photo, task="denoise", sigma="0.1", steps="2", samples=2, api_name="/restore")
    found = list(place.rglob("*"))
    assert sum(path.suffix == ".png" for path in found) >= 2
    for path in [*found, *place.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    # It also ends in the middle of a long restoration, for which nobody waits any more.
    client.submit(photo=photo, task="denoise", sigma="0.1", steps="1000", samples=2, api_name="/restore")
    time.sleep(3)
    page.send_signal(number)
    out, error = page.communicate(timeout=UPLOADED)
    assert page.returncode == 0
    assert not [path for path in place.rglob("*") if path.is_file() or "restore" in path.name or "gradio" in path.name]
    assert "share" not in (out + error).lower() and "Traceback" not in out + error, out + error


def _free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
