"""A stub of the Hugging Face Hub on loopback, in memory, standard library only: repos, commits, LFS, files.

    with HubStub() as hub:
        environment = hub.environment(home)  # for a process of its own
        hub.fail("/commit/", 503, times=2)   # what it answers next to requests whose path contains this

Commits are immutable; an ETag is the git blob's SHA-1, or the SHA-256 of an LFS object, as the Hub's are.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet", "*.png")
NOW = "2026-01-01T00:00:00.000Z"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Commits of one repo: each the files by path, {"data" or "sha256", "oid"}."""

    def __init__(self) -> None:
        self.commits: dict[str, dict] = {}
        self.add({})

    def add(self, files: dict[str, dict]) -> str:
        state = [sorted((path, file["oid"]) for path, file in files.items()), len(self.commits)]
        self.head = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head


class HubStub:
    """The server; `repos` ("models/org/name" -> Repo) and `log` (verb, path) can be looked at."""

    def __init__(self, token: str = "hf_stub") -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.failures: list[list] = []  # [part of the path, status, times left]
        self.lock = threading.RLock()

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def fail(self, part: str, status: int, times: int = 10**9) -> None:
        self.failures.append([part, status, times])

    def create(self, repo: str, kind: str = "models") -> Repo:
        """An empty repo."""
        return self.repos.setdefault(f"{kind}/{repo}", Repo())

    def requests(self, part: str) -> int:
        return sum(part in path for _, path in self.log)

    def files(self, repo: str, kind: str = "models") -> dict[str, bytes]:
        """What the main branch of a repo holds."""
        found = self.repos[f"{kind}/{repo}"]
        return {path: self.content(file) for path, file in found.commits[found.head].items()}

    def content(self, file: dict) -> bytes:
        return self.lfs[file["sha256"]] if "sha256" in file else file["data"]

    def failure(self, path: str) -> int | None:
        for failure in self.failures:
            if failure[0] in path and failure[2]:
                failure[2] -= 1
                return failure[1]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubStub:
        return self.server.hub

    def log_message(self, *words: object) -> None:
        """Nothing on stderr."""

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.read_body()
        with self.hub.lock:
            self.hub.log.append((self.command, path))
            if status := self.hub.failure(path):
                # a page, as a proxy in front of the Hub answers when there is no Hub behind it
                self.reply(b"<html>told to fail</html>", {"X-Error-Message": "told to fail"}, status)
            elif self.may_not_write(path):
                self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
            else:
                self.route(path, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def may_not_write(self, path: str) -> bool:
        writes = self.command in ("POST", "PUT", "DELETE") and not path.startswith("/_lfs/")
        return writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}"

    def reply(self, body: Any, headers: dict | None = None, status: int = 200) -> None:
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str, headers: dict | None = None) -> None:
        errors = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.reply({"error": message}, errors, status)

    def route(self, path: str, query: dict, body: bytes) -> None:
        if path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.startswith("/_lfs/"):
            if self.command == "PUT":
                self.hub.lfs[hashlib.sha256(body).hexdigest()] = body
            self.reply({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.reply({"transfer": "basic", "objects": [self.upload(item) for item in json.loads(body)["objects"]]})
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(f"{match[1] or 'models'}/{match[2]}", match[3], match[4])
        elif match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(.*))?", path):
            self.api(match[1], (match[2] or "").split("/"), query, body)
        else:
            self.refuse(404, "NotFound", path)

    def create(self, asked: dict) -> None:
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if f"{kind}/{name}" in self.hub.repos:
            self.reply({"error": "You already created this repo", "url": url}, status=409)
        else:
            self.hub.repos[f"{kind}/{name}"] = Repo()
            self.reply({"url": url, "name": name, "id": name})

    def upload(self, item: dict) -> dict:
        """An LFS object's answer: where to put it, unless it is there."""
        known = item["oid"] in self.hub.lfs
        actions = {"upload": {"href": f"{self.hub.endpoint}/_lfs/{item['oid']}"}}
        answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
        return answer if known else {**answer, "actions": actions}

    def commit_of(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.refuse(404, "RepoNotFound", f"Repository {name} not found")
            return None
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, sha

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self.commit_of(name, revision)) is None:
            return
        repo, sha = found
        if (file := repo.commits[sha].get(path)) is None:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        content, etag = self.hub.content(file), f'"{file.get("sha256") or file["oid"]}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag}
        if "sha256" in file:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self.reply(content, headers)

    def api(self, name: str, parts: list[str], query: dict, body: bytes) -> None:
        verb, revision = parts[0], parts[1] if len(parts) > 1 else "main"
        if (found := self.commit_of(name, revision)) is None:
            return
        repo, sha = found
        files = repo.commits[sha]
        if verb in ("", "revision"):
            self.reply(self.info(name.partition("/")[2], sha, files))
        elif verb == "tree":
            self.reply(self.tree(files, "/".join(parts[2:]), query.get("recursive", ["false"])[0].lower() == "true"))
        elif verb == "paths-info":
            asked = (json.loads(body) if body.startswith(b"{") else parse_qs(body.decode()))["paths"]
            self.reply([self.entry(path, files[path]) for path in asked if path in files])
        elif verb == "preupload":
            self.reply({"files": [self.mode(asked, files) for asked in json.loads(body)["files"]]})
        elif verb == "commit":
            made = repo.add(self.committed(files, body))
            url = f"{self.hub.endpoint}/{name.removeprefix('models/')}/commit/{made}"
            self.reply({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})
        else:
            self.refuse(404, "NotFound", verb)

    def info(self, name: str, sha: str, files: dict) -> dict:
        siblings = [{"rfilename": path} for path in sorted(files)]
        flags = {"private": False, "disabled": False, "gated": False}
        numbers = {"downloads": 0, "likes": 0, "tags": [], "lastModified": NOW, "createdAt": NOW}
        return {"_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "siblings": siblings, **flags, **numbers}

    def entry(self, path: str, file: dict) -> dict:
        size = len(self.hub.content(file))
        entry = {"type": "file", "path": path, "size": size, "oid": file["oid"]}
        if "sha256" in file:
            entry["lfs"] = {"oid": file["sha256"], "size": size, "pointerSize": 134}
        return entry

    def tree(self, files: dict, folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(prefix)]
        flat = [path for path in below if recursive or "/" not in path[len(prefix) :]]
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in below if path not in flat})
        return [self.entry(path, files[path]) for path in flat] + [
            {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders
        ]

    def mode(self, asked: dict, files: dict) -> dict:
        path, old = asked["path"], files.get(asked["path"], {})
        lfs = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
        known = old.get("sha256") or old.get("oid")
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": known}

    def committed(self, files: dict, body: bytes) -> dict:
        """The files after a commit, whose body has one change a line."""
        files = dict(files)
        for line in body.splitlines():
            change = json.loads(line)
            kind, value = change["key"], change["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = {"data": content, "oid": git_oid(content)}
            elif kind == "lfsFile":
                files[value["path"]] = {"sha256": value["oid"], "oid": git_oid(self.hub.lfs[value["oid"]])}
            elif kind == "deletedFile":
                del files[value["path"]]
        return files
