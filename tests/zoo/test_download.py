"""Downloads from real HTTP servers: cut connections, killed processes, corrupted bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from operators import RestoreError
from restore.zoo import download
from tests.zoo.servers import archive, serving, sha


def fetch(*servers, target, size=None, sha256=None, **options):
    def verify(part):
        return download.verify_file(part, size, sha256, target.name)

    urls = tuple(server.url for server in servers)
    return download.fetch_file(urls, target, size, verify, patience=0.01, **options)


def test_a_cut_download_continues_where_it_stopped(tmp_path):
    content, seen = archive(), []
    with serving(content, cut=[100_000, 50_000]) as server:
        digest = fetch(
            server,
            target=tmp_path / "w.pt",
            sha256=sha(content),
            progress=lambda done, total: seen.append((done, total)),
        )
    first, second = (int(wanted[6:-1]) for wanted in server.requests[1:])  # whole blocks are kept
    assert server.requests[0] is None and len(server.requests) == 3
    assert 60_000 < first <= 100_000 and first < second <= first + 50_000
    assert digest == sha(content) and (tmp_path / "w.pt").read_bytes() == content
    assert seen[-1] == (len(content), len(content)) and sorted(seen) == seen
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_a_killed_process_leaves_a_part_that_the_next_one_finishes(tmp_path):
    content = archive()
    code = "import sys; from pathlib import Path; from restore.zoo import download;"
    code += "download.fetch_file((sys.argv[1],), Path(sys.argv[2]), progress=lambda *_: __import__('os')._exit(9))"
    with serving(content, cut=[120_000]) as server:
        target = tmp_path / "w.pt"
        done = subprocess.run([sys.executable, "-c", code, server.url, str(target)], cwd=Path(__file__).parents[2])
        assert done.returncode == 9 and not target.exists()
        kept = (tmp_path / "w.pt.part").stat().st_size
        assert 0 < kept <= 120_000
        fetch(server, target=target, sha256=sha(content))
    assert server.requests == [None, f"bytes={kept}-"] and target.read_bytes() == content


def test_a_server_without_ranges_or_with_a_new_file_starts_over(tmp_path):
    content, other = archive(), archive(seed=1)
    with serving(content, cut=[100_000], ranges=False) as server:
        fetch(server, target=tmp_path / "w.pt", sha256=sha(content))
    assert server.requests == [None, "bytes=98304-"] and (tmp_path / "w.pt").read_bytes() == content
    with serving(content, cut=[100_000] * 3) as server:
        with pytest.raises(RestoreError):
            fetch(server, target=tmp_path / "v.pt", sha256="0" * 64, attempts=0)  # gives up at the first cut
        server.content = other  # the publisher replaces the file: its parts must not be mixed
        server.cut = []
        fetch(server, target=tmp_path / "v.pt")
    assert (tmp_path / "v.pt").read_bytes() == other and server.requests[-1] == "bytes=98304-"


def test_a_complete_or_overlong_part_is_recognised(tmp_path):
    content = archive()
    for part in (content, content + b"x"):
        with serving(content) as server:
            (tmp_path / "w.pt.part").write_bytes(part)
            (tmp_path / "w.pt.part.json").write_text(json.dumps({"url": server.url, "validator": None}))
            fetch(server, target=tmp_path / "w.pt", sha256=sha(content))
        assert (tmp_path / "w.pt").read_bytes() == content
        assert server.requests == [f"bytes={len(part)}-"] + ([None] if part is not content else [])


def test_a_bad_old_part_is_thrown_away_once(tmp_path):
    content = archive()
    with serving(content) as server:
        (tmp_path / "w.pt.part").write_bytes(b"x" * 1000)
        (tmp_path / "w.pt.part.json").write_text(json.dumps({"url": server.url, "validator": None}))
        fetch(server, target=tmp_path / "w.pt", sha256=sha(content))
    assert server.requests == ["bytes=1000-", None] and (tmp_path / "w.pt").read_bytes() == content


def test_wrong_content_is_refused_and_removed(tmp_path):
    content = archive()
    cases = (
        ({"corrupt": True}, {"sha256": sha(content)}, f"expected SHA-256 {sha(content)}, got "),
        ({}, {"size": 5}, f"has {len(content)} bytes instead of 5"),
        ({"html": True}, {}, "web page.*by hand"),
        ({"status": 404}, {}, "404.*by hand"),
    )
    for server_options, options, message in cases:
        with serving(content, **server_options) as server, pytest.raises(RestoreError, match=message):
            fetch(server, target=tmp_path / "w.pt", advice="Do it by hand.", **options)
        assert len(server.requests) == 1
    with serving(content[:-2000]) as server, pytest.raises(RestoreError, match="end of its archive is missing"):
        fetch(server, target=tmp_path / "w.pt")  # truncated at the publisher, no checksum known
    with pytest.raises(RestoreError, match="broke 2 times"):
        download.fetch_file(("http://127.0.0.1:9/w.pt",), tmp_path / "w.pt", patience=0.01, attempts=2)
    assert list(tmp_path.iterdir()) == []


def test_the_second_address_is_tried(tmp_path):
    content = archive()
    with serving(content, html=True) as first, serving(content) as second:
        fetch(first, second, target=tmp_path / "w.pt", sha256=sha(content))
    assert len(first.requests) == len(second.requests) == 1
