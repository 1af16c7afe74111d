"""A server on this machine that speaks as much of the hub's protocol as pushing and pulling models takes."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re

from tests.zoo.servers import running

TOKEN = "hf_right"


class Hub(http.server.ThreadingHTTPServer):
    """repos: {id: {"private", "branches": {name: {path: content}}, "messages": [...]}}. breaks: uploads of large files
    that break off, from now on. unknown: requests that were not understood."""

    daemon_threads = True

    def __init__(self):
        self.repos, self.blobs, self.breaks, self.unknown = {}, {}, 0, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, message, code=None):
        self.reply({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    @property
    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, repo, branch="main"):
        """The files of a branch, by its name or its commit, or None after a refusal."""
        entry = self.server.repos.get(repo)
        if entry is None or (entry["private"] and not self.is_known):
            return self.refuse(401, "Invalid username or password.", "RepoNotFound")
        named = entry["branches"].items()
        branch = next((name for name, files in named if branch_id(name, files) == branch), branch)
        if branch not in entry["branches"]:
            return self.refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return entry["branches"][branch]

    def commit(self, repo, branch):
        return branch_id(branch, files) if (files := self.server.repos[repo]["branches"].get(branch)) else branch

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, branch = found[1], found[2], found[3] or "main"
            files = self.find(repo, branch)
            if files is None:
                return None
            listing = [
                {"rfilename": n, "type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()
            ]
            if kind == "tree":
                return self.reply(listing)
            private = self.server.repos[repo]["private"]
            return self.reply({"id": repo, "sha": self.commit(repo, branch), "private": private, "siblings": listing})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, branch = found[1], found[2]
            files = self.find(repo, branch)
            if files is None:
                return None
            if found[3] not in files:
                return self.refuse(404, "Entry not found", "EntryNotFound")
            body = files[found[3]]
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            return self.reply(body, ETag=tag, X_Repo_Commit=self.commit(repo, branch))
        self.server.unknown.append(self.path)
        return self.refuse(404, "unknown")

    do_HEAD = do_GET

    def do_PUT(self):
        if self.server.breaks:
            self.server.breaks -= 1
            self.rfile.read(100)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self.reply({})

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if not self.is_known:
            return self.refuse(401, "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            new = repo not in self.server.repos
            if new:
                private = asked.get("private") or asked.get("visibility") == "private"  # by versions of the client
                entry = {"private": bool(private), "branches": {"main": {}}, "messages": []}
                self.server.repos[repo] = entry
            return self.reply({"url": f"{self.server.url}/{repo}", "id": repo}, 200 if new else 409)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            self.server.repos[found[1]]["branches"][found[2]] = {}
            return self.reply({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self.find(found[1], found[2]) is None:
                return None
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in names}
            return self.reply(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}", "header": {}}}
            return self.reply({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            files = self.find(found[1], found[2])
            if files is None:
                return None
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.repos[found[1]]["messages"].append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
            oid = branch_id(found[2], files)
            url = f"{self.server.url}/{found[1]}/commit/{oid}"
            return self.reply({"success": True, "commitOid": oid, "commitUrl": url})
        self.server.unknown.append(self.path)
        return self.refuse(404, "unknown")


def branch_id(name, files):
    """The commit: a hash of the branch and its files."""
    return hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()


def serving():
    return running(Hub())
