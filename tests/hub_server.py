"""A Hub on the loopback device, as far as huggingface_hub's clients push and fetch: repositories, branches, commits of
content-addressed files, LFS uploads. What is uploaded is verified: sizes, sha256, card metadata, token.

Import the fixtures `hub_server` and, for HfApi in the test's own process, also `hub`. Other clients read HF_ENDPOINT
when they are imported: run them in a subprocess with `hub_server.environment(tmp_path)`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml

TOKEN = "dummy"
REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+?)"
FILES = r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+?)"


class Refused(Exception):
    """Answered with this status, a code as the Hub's X-Error-Code, and what else the Hub says."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(" ".join(message.split()))
        self.status, self.code, self.more = status, code, more


class HubServer(ThreadingHTTPServer):
    """Files lie under `folder` by their sha256; `requests` lists what was asked, as (method, path)."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[str, dict[str, Any]] = {}  # {"private", "branches": {name: oid}}, by "kind/owner/name"
        self.commits: dict[str, dict[str, tuple[str, bool]]] = {"0" * 40: {}}  # oid: {path: (sha256, is LFS)}
        self.messages: dict[str, str] = {}
        self.commits_left: int | None = None  # until the Hub takes no more
        self.lock = threading.Lock()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a client process, its caches under `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        return {**os.environ, **ours, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, repo: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """What a repository holds."""
        tree = self.commits[self.resolve(f"{kind}/{repo}", revision)]
        return {path: self.blob(sha256) for path, (sha256, _) in tree.items()}

    def resolve(self, repo: str, revision: str) -> str:
        if repo not in self.repos:
            raise Refused(404, f"no repository {repo}", "RepoNotFound")
        oid = self.repos[repo]["branches"].get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return oid

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        return sha256

    def blob(self, sha256: str) -> bytes:
        return (self.folder / sha256).read_bytes()

    def describe(self, path: str, sha256: str, is_lfs: bool) -> dict[str, Any]:
        data = self.blob(sha256)
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 134}} if is_lfs else {}
        return {"type": "file", "path": path, "size": len(data), "oid": oid, **lfs}


def folders(files: dict[str, Any]) -> list[str]:
    return sorted({str(above) for path in files for above in PurePosixPath(path).parents} - {"."})


def folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_any(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.read_chunk, b""))
        self.server.requests.append((self.command, path))
        status, headers, answer = 200, {}, b""
        try:
            if self.command != "GET" and self.command != "HEAD" and "/lfs-put/" not in path:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}" and path != "/api/validate-yaml":
                    raise Refused(401, "no valid token")
            for method, pattern, action in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        headers, answer = action(self, body, **match.groupdict())
                    break
            else:
                raise Refused(404, f"{self.command} {path}: this Hub has no such endpoint")
        except Refused as refusal:
            status, headers = refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            answer = {"error": str(refusal), "errors": [{"message": str(refusal)}], **refusal.more}
        if not isinstance(answer, bytes):
            answer = json.dumps(answer).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return data

    def log_message(self, *arguments: Any) -> None:
        pass

    def create(self, body: bytes) -> tuple[dict, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        key = f"{asked.get('type') or 'model'}/{name}"
        url = f"{self.server.url}/{name}"
        if key in self.server.repos:
            raise Refused(409, f"{name} exists", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[key] = {"private": private, "branches": {"main": "0" * 40}}
        return {}, {"url": url, "name": name, "id": name}

    def validate_yaml(self, body: bytes) -> tuple[dict, Any]:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            raise Refused(400, f"card metadata: {error}") from error
        if not isinstance(metadata, dict):
            raise Refused(400, "card metadata: must be a mapping")
        return {}, {"errors": [], "warnings": [] if metadata else [{"message": "empty metadata"}]}

    def branch(self, body: bytes, kind: str, repo: str, branch: str) -> tuple[dict, Any]:
        branches = self.server.repos[f"{kind}/{repo}"]["branches"]
        if branch in branches:
            raise Refused(409, f"branch {branch} exists")
        branches[branch] = self.server.resolve(f"{kind}/{repo}", json.loads(body).get("startingPoint", "main"))
        return {}, {}

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> tuple[dict, Any]:
        tree, files = self.server.commits[self.server.resolve(f"{kind}/{repo}", revision)], []
        for each in json.loads(body)["files"]:
            path, sample = each["path"], base64.b64decode(each["sample"])
            is_lfs = path.endswith((".safetensors", ".parquet")) or b"\0" in sample
            there = self.server.describe(path, *tree[path])["oid"] if path in tree and not is_lfs else None
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there})
        return {}, {"files": files}

    def lfs_batch(self, body: bytes, kind: str | None, repo: str) -> tuple[dict, Any]:
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs-put/{each['oid']}/{each['size']}"}
            stored = (self.server.folder / each["oid"]).exists()
            objects.append({**each, "authenticated": True} | ({} if stored else {"actions": {"upload": upload}}))
        return {}, {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str, size: str) -> tuple[dict, Any]:
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise Refused(422, f"upload is not the object {oid} of {size} bytes")
        self.server.store(body)
        return {}, b""

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> tuple[dict, Any]:
        parent = self.server.resolve(f"{kind}/{repo}", revision)
        if self.server.commits_left is not None:
            if not self.server.commits_left:
                raise Refused(429, "too many commits")
            self.server.commits_left -= 1
        tree, message = dict(self.server.commits[parent]), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                tree[value["path"]] = (self.server.store(base64.b64decode(value["content"])), False)
            elif key == "lfsFile":
                stored = self.server.folder / value["oid"]
                if not stored.exists() or stored.stat().st_size != value.get("size", stored.stat().st_size):
                    raise Refused(400, f"{value['path']}: its LFS object was not uploaded")
                tree[value["path"]] = (value["oid"], True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                tree = {path: it for path, it in tree.items() if path != gone and not path.startswith(gone + "/")}
            else:
                raise Refused(400, f"unknown operation {key}")
        oid = hashlib.sha1(json.dumps([parent, message, sorted(tree.items())]).encode()).hexdigest()
        self.server.commits[oid], self.server.messages[oid] = tree, message
        self.server.repos[f"{kind}/{repo}"]["branches"][revision] = oid
        return {}, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}

    def info(self, body: bytes, kind: str, repo: str, revision: str | None) -> tuple[dict, Any]:
        oid = self.server.resolve(f"{kind}/{repo}", revision or "main")
        siblings = [{"rfilename": path} for path in sorted(self.server.commits[oid])]
        private = self.server.repos[f"{kind}/{repo}"]["private"]
        known = {"id": repo, "sha": oid, "private": private, "siblings": siblings, "tags": [], "downloads": 0}
        return {}, known | {"likes": 0, "disabled": False, "gated": False}

    def tree(self, body: bytes, kind: str, repo: str, revision: str, under: str | None) -> tuple[dict, Any]:
        files = self.server.commits[self.server.resolve(f"{kind}/{repo}", revision)]
        inside = f"{under}/" if under else ""
        wanted = [path for path in (*folders(files), *sorted(files)) if path.startswith(inside)]
        if "recursive" not in parse_qs(urlsplit(self.path).query):
            wanted = [path for path in wanted if "/" not in path[len(inside) :]]
        listed = [self.server.describe(path, *files[path]) if path in files else folder(path) for path in wanted]
        if under and not wanted:
            raise Refused(404, f"no folder {under}", "EntryNotFound")
        return {}, listed

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> tuple[dict, Any]:
        files = self.server.commits[self.server.resolve(f"{kind}/{repo}", revision)]
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        described = [self.server.describe(path, *files[path]) for path in paths if path in files]
        return {}, described + [folder(path) for path in folders(files) if path in paths]

    def file(self, body: bytes, kind: str | None, repo: str, revision: str, path: str) -> tuple[dict, Any]:
        oid = self.server.resolve(f"{kind or 'model'}/{repo}", revision)
        if path not in self.server.commits[oid]:
            raise Refused(404, f"no file {path}", "EntryNotFound")
        sha256, is_lfs = self.server.commits[oid][path]
        known = self.server.describe(path, sha256, is_lfs)
        etag = known["lfs"]["oid"] if is_lfs else known["oid"]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"'}
        if is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(known["size"])}
        return headers, self.server.blob(sha256)


ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", REPO + "/branch/(?P<branch>.+)", Handler.branch),
    ("POST", REPO + "/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", FILES + ".git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs-put/(?P<oid>[0-9a-f]{64})/(?P<size>[0-9]+)", Handler.lfs_put),
    ("POST", REPO + "/commit/(?P<revision>.+)", Handler.commit),
    ("GET", REPO + "(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", Handler.tree),
    ("POST", REPO + "/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET HEAD", FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.file),
)


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    server = HubServer(tmp_path_factory.mktemp("hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The same, for `HfApi` in this process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.requests.clear()
    return hub_server
