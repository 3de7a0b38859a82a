"""A Hub on loopback, as much of one as huggingface_hub's client asks for: commits, large files, gates and tokens, all in memory.

    with HubServer() as hub:                             # hub.url is what HF_ENDPOINT is set to
        ...
        hub.repos["model", "me/decoder"].commits[-1].files

Tokens: `hf_write` and `hf_read` are me's, any other is not valid.  Faults: `hub.fault = f` calls f("PUT", path, bytes so far, total) for
every piece of a large file that arrives, again and again until it is not False; it may raise Cut, which drops the connection.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKENS = {"hf_write": ("me", "write"), "hf_read": ("me", "read")}
PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}
LARGE = (".safetensors", ".parquet", ".png", ".bin", ".gguf")
COLOURS = "red yellow green blue indigo purple pink gray".split()


class Cut(Exception):
    """Raised by a fault: the connection breaks off here."""


@dataclass
class File:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:  # what git calls it; of a large file, its pointer's
        data = self.content
        if self.large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def info(self, path: str) -> dict:
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid} | large


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    body: dict = field(default_factory=dict)  # what it was created with
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, File]) -> Commit:
        sha = hashlib.sha1(f"{self.kind}{self.id}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        return self.commits[-1] if revision == "main" else next((c for c in self.commits if c.sha == revision), None)


def directory(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def refuse(status: int, code: str | None = None, message: str = "") -> Response:
    headers = {"X-Error-Code": code} if code else {}
    return JSONResponse({"error": message or code}, status, headers | ({"X-Error-Message": message} if message else {}))


def card_errors(kind: str, content: str) -> list[str]:
    """What the Hub finds wrong with a card's metadata."""
    try:
        data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
    except (yaml.YAMLError, IndexError) as error:
        return [f"the metadata is not YAML: {error}"]
    found = []
    if kind == "space":
        found += [f'"{key}" must be one of {COLOURS}' for key in ("colorFrom", "colorTo") if data.get(key) not in COLOURS]
        found += ['"sdk" must be one of gradio, docker, static'] if data.get("sdk") not in ("gradio", "docker", "static") else []
        found += ['"short_description" is longer than 60 characters'] if len(data.get("short_description", "")) > 60 else []
        found += ['"python_version" must be text'] if not isinstance(data.get("python_version", ""), str) else []
    if kind == "model":
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                found += ['"model-index" lacks a metric'] if not all({"type", "value"} <= set(m) for m in result["metrics"]) else []
                found += ['"model-index" lacks a task'] if "type" not in result["task"] or "name" not in result["dataset"] else []
    if kind == "dataset":
        found += ['"configs" lacks data files'] if not all(c.get("data_files") for c in data.get("configs", [{}])) else []
    found += ['"license" must be text'] if not isinstance(data.get("license", ""), str) else []
    return found


class HubServer:
    def __init__(self, port: int = 0):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files that have arrived, by sha256
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str, int, int], bool | None] | None = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> HubServer:
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=self._routes()), log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def add(self, kind: str, repo_id: str, files: dict[str, bytes], **about) -> Repo:
        """A repository with one commit that holds `files`, put there without the API."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, **about)
        repo.commit("initial commit", {p: File(content, p.endswith(LARGE)) for p, content in files.items()})
        return repo

    # --- who may do what ---------------------------------------------------------------------------------------------

    def _user(self, request: Request) -> tuple[str, str] | None:
        return TOKENS.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    def _reading(self, kind: str, action: Callable, gate: bool = False):
        """An endpoint of a repository: action(request, repo, commit), for those who may read it; the commit is that of {rev}, or main's."""

        async def endpoint(request: Request) -> Response:
            self.requests.append((request.method, request.url.path))
            repo = self.repos.get((kind, "{ns}/{name}".format(**request.path_params)))
            if repo is None or (repo.private and self._user(request) is None):
                return refuse(401, "RepoNotFound", "Repository not found")
            if gate and repo.gated:
                return refuse(403, "GatedRepo", "Access to this repository is restricted")
            commit = repo.at(request.path_params.get("rev", "main"))
            return refuse(404, "RevisionNotFound", "Invalid rev id") if commit is None else await action(request, repo, commit)

        return endpoint

    def _writing(self, kind: str, action: Callable):
        async def allowed(request: Request, repo: Repo, commit: Commit) -> Response:
            user = self._user(request)
            if user is None:
                return refuse(401, message="Invalid credentials in Authorization header")
            if user != (repo.id.split("/")[0], "write"):
                return refuse(403, message="You don't have the rights to write to this repository")
            return await action(request, repo, commit)

        return self._reading(kind, allowed)

    def _routes(self) -> list[Route]:
        routes = [
            Route("/api/whoami-v2", self._whoami),
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/lfs/{oid}", self._put, methods=["PUT"]),
        ]
        for kind, prefix in PREFIX.items():
            api = f"/api/{kind}s/{{ns}}/{{name}}"
            writes = {"preupload/{rev}": self._preupload, "commit/{rev}": self._commit}
            reads = {"": self._info, "/revision/{rev}": self._info, "/tree/{rev}": self._tree, "/tree/{rev}/{path:path}": self._tree}
            routes += [Route(f"{api}/{path}", self._writing(kind, action), methods=["POST"]) for path, action in writes.items()]
            routes += [Route(api + path, self._reading(kind, action)) for path, action in reads.items()]
            routes += [
                Route(f"{api}/paths-info/{{rev}}", self._reading(kind, self._paths), methods=["POST"]),
                Route(f"/{prefix}{{ns}}/{{name}}.git/info/lfs/objects/batch", self._writing(kind, self._batch), methods=["POST"]),
                Route(f"/{prefix}{{ns}}/{{name}}/resolve/{{rev}}/{{path:path}}", self._reading(kind, self._resolve, gate=True)),
            ]
        return routes

    # --- endpoints ---------------------------------------------------------------------------------------------------

    async def _whoami(self, request: Request) -> Response:
        if (user := self._user(request)) is None:
            return refuse(401, message="Invalid credentials in Authorization header")
        return JSONResponse({"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    async def _validate(self, request: Request) -> Response:
        body = await request.json()
        errors = [{"message": text} for text in card_errors(body["repoType"], body["content"])]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def _create(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        body, user = await request.json(), self._user(request)
        if user is None:
            return refuse(401, message="Invalid credentials in Authorization header")
        kind, repo_id = body.get("type") or "model", f"{body.get('organization') or user[0]}/{body['name']}"
        if user != (repo_id.split("/")[0], "write"):
            return refuse(403, message=f"You don't have the rights to create a {kind} under this namespace")
        url = {"url": f"{self.url}/{PREFIX[kind]}{repo_id}"}
        if (kind, repo_id) in self.repos:
            return JSONResponse(url | {"error": "You already created this repo"}, 409)
        self.add(kind, repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=body.get("visibility") == "private", body=body)
        return JSONResponse(url)

    async def _info(self, request: Request, repo: Repo, commit: Commit) -> Response:
        about = {"id": repo.id, "sha": commit.sha, "private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        return JSONResponse(about | {"tags": [], "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    async def _tree(self, request: Request, repo: Repo, commit: Commit) -> Response:
        below, deep = request.path_params.get("path", ""), request.query_params.get("recursive", "").lower() in ("1", "true")
        entries, folders = [], set()
        for path, file in sorted(commit.files.items()):
            rest = path.removeprefix(below).removeprefix("/") if not below or path.startswith(f"{below}/") else ""
            parts = rest.split("/")
            if rest and (deep or len(parts) == 1):
                entries.append(file.info(path))
            top = "/".join(filter(None, [below, parts[0]]))
            if len(parts) > 1 and top not in folders:
                folders.add(top)
                entries.append(directory(top))
        return refuse(404, "EntryNotFound", f"{below} does not exist") if below and not entries else JSONResponse(entries)

    async def _paths(self, request: Request, repo: Repo, commit: Commit) -> Response:
        form = await request.json() if "json" in request.headers.get("content-type", "") else await request.form()
        paths = form.getlist("paths") if hasattr(form, "getlist") else form["paths"]
        found = [commit.files[p].info(p) for p in paths if p in commit.files]
        folders = [p for p in paths if p not in commit.files and any(name.startswith(f"{p}/") for name in commit.files)]
        return JSONResponse(found + [directory(p) for p in folders])

    async def _resolve(self, request: Request, repo: Repo, commit: Commit) -> Response:
        path = request.path_params["path"]
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if (file := commit.files.get(path)) is None:
            return JSONResponse({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{file.sha256 if file.large else file.oid}"'
        content, status = file.content, 200
        if wanted := request.headers.get("range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content-Range"], status = f"bytes {start}-{end}/{len(content)}", 206
            content = content[start : end + 1]
        return Response(content, status, headers, "application/octet-stream")

    async def _preupload(self, request: Request, repo: Repo, commit: Commit) -> Response:
        answers = []
        for file in (await request.json())["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 2**20 or b"\0" in base64.b64decode(file["sample"])
            held = commit.files.get(file["path"])
            oid = None if held is None else held.sha256 if held.large else held.oid
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answers})

    async def _batch(self, request: Request, repo: Repo, commit: Commit) -> Response:
        objects = [{"oid": o["oid"], "size": o["size"]} for o in (await request.json())["objects"]]
        for o in objects:
            if o["oid"] not in self.blobs:
                o["actions"] = {"upload": {"href": f"{self.url}/lfs/{o['oid']}", "header": {}}}
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _put(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path))
        content, total = b"", int(request.headers["content-length"])
        try:
            async for piece in request.stream():
                content += piece
                while self.fault is not None and self.fault("PUT", request.url.path, len(content), total) is False:
                    await asyncio.sleep(0.02)
        except Cut:
            request.receive.__self__.transport.abort()  # uvicorn's: the client sees the connection break, no answer
            return Response(status_code=500)
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            return refuse(400, message="The content is not what was announced")
        self.blobs[request.path_params["oid"]] = content
        return Response()

    async def _commit(self, request: Request, repo: Repo, commit: Commit) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        header, files = lines[0]["value"], dict(commit.files)
        if (parent := header.get("parentCommit")) is not None and parent != commit.sha:
            return refuse(412, message="A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return refuse(400, message="A pointer names a large file that has not been uploaded")
                files[value["path"]] = File(self.blobs[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                return refuse(404, "EntryNotFound", "A file with this name doesn't exist")
        done = repo.commit(header["summary"], files)
        return JSONResponse({"success": True, "commitOid": done.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{done.sha}"})
