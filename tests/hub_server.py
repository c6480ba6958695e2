"""A Hub on loopback: repositories, branches, commits, LFS uploads and downloads, as huggingface_hub speaks to it.

Tokens decide what goes wrong: `reader` may write nothing, `unlucky` loses the connection while weights are sent, `late` while
the commit is. Repositories are `{id: Repository}` in `Hub.repositories`; whatever was asked for is in `Hub.asked`.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool = False
    branches: dict = field(default_factory=lambda: {"main": []})  # name -> commits, each (sha, {path: bytes})

    def commit(self, revision):
        """`(sha, files)` of a branch or of a commit, or None."""
        if revision in self.branches:
            return self.branches[revision][-1] if self.branches[revision] else ("0" * 40, {})
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """Start with `with running_hub() as hub:`; `hub.url` is what HF_ENDPOINT is to be."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.asked = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id, revision="main"):
        return self.repositories[repo_id].commit(revision)[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def token(self):
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.asked.append((self.command, path))
        for method, pattern, function in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return function(self, **match.groupdict())
        return self.error(404, "EntryNotFound", f"{self.command} {path}")

    def send(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, code, message):
        self.send(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def refused(self):
        if not self.token or self.token == "stranger":
            self.error(401, "Unauthorized", "Invalid username or password.")
        elif self.token == "reader":
            self.error(403, "Forbidden", "Forbidden: you must use a token with write permission.")
        else:
            return False
        return True

    def repository(self, repo, revision="main"):
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self.token):
            self.error(404, "RepoNotFound", f"Repository {repo} not found")
            return None, None
        commit = found.commit(revision)
        if commit is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return (found, commit) if commit else (None, None)

    def create(self):
        if self.refused():
            return
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if repo in self.server.repositories:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[repo] = Repository(private)
        self.send(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def branch(self, repo, name):
        found, _ = self.repository(repo)
        if found is None or self.refused():
            return
        if name in found.branches:
            return self.error(409, "Conflict", "Reference already exists")
        found.branches[name] = list(found.branches["main"])
        self.send(200, {})

    def preupload(self, repo, revision):
        found, _ = self.repository(repo, revision)
        if found is None or self.refused():
            return
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if name.endswith((".safetensors", ".png", ".bin")) else "regular" for name in names]
        self.send(
            200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]}
        )

    def lfs_batch(self):
        objects = [
            {**thing, "actions": {"upload": {"href": f"{self.server.url}/lfs/{self.token}/{thing['oid']}"}}}
            for thing in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, token, oid):
        if token == "unlucky":
            return self.hang_up()
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "BadRequest", "the content is not what was announced")
        self.server.blobs[oid] = self.body
        self.send(200)

    def commit(self, repo, revision):
        found, commit = self.repository(repo, revision)
        if found is None or self.refused():
            return
        if self.token == "late":
            return self.hang_up()
        files = dict(commit[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(self.body + commit[0].encode()).hexdigest()
        found.branches[revision].append((sha, files))
        self.send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, repo, revision="main"):
        found, commit = self.repository(repo, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in commit[1]]
            self.send(
                200, {"id": repo, "modelId": repo, "sha": commit[0], "private": found.private, "siblings": siblings, "tags": []}
            )

    def tree(self, repo, revision, folder=""):
        found, commit = self.repository(repo, revision)
        if found is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        listed = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in commit[1].items()
            if path.startswith(prefix)
        ]
        if prefix and not listed:
            return self.error(404, "EntryNotFound", f"{folder} does not exist")
        self.send(200, listed)

    def resolve(self, repo, revision, path):
        found, commit = self.repository(repo, revision)
        if found is None:
            return
        if path not in commit[1]:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = commit[1][path]
        self.send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit[0])


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda handler: handler.send(200, {"errors": [], "warnings": []})),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<token>[^/]*)/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?P<folder>/.*)?", Handler.tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_as_writer(hub, script, *argv, home):
    """Run a script in a process for which this is the Hub, and fail if it does."""
    here = Path(__file__).parent
    variables = {
        **{name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "HF_MODULES_CACHE")},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "writer",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }  # fmt: skip
    command = [sys.executable, "-c", script, *map(str, argv)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
