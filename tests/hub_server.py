"""A server on this machine that answers as the Hugging Face hub does, for downloads and for uploads."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c" * 40
TOKEN = "hf_of_somebody"
USER, ORGANISATION = "somebody", "lab"


class Hub(BaseHTTPRequestHandler):
    """`server.files` maps a repository to its files by path, or to the bytes of its `model.safetensors`.

    `server.fault` is what goes wrong: of downloads a status, `"cut"` or `"cut once"`; or `(method, text, status)`
    of the requests whose path has the text: 0 closes the connection, None never answers. `server.private` are the
    repositories that need the token; `server.blobs` the large files that were uploaded, by their SHA-256.
    """

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        self.answer(with_body=True)

    def do_PUT(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server = self.server
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.requests.append((self.command, path))
        self.close_connection = True
        if isinstance(server.fault, tuple):
            method, text, status = server.fault
            if method == self.command and text in path:
                if status is None:
                    server.closed.wait()
                elif status:
                    self.give({"error": "no"}, status)
                return
        if path.startswith("/api/") or path.endswith("/info/lfs/objects/batch"):
            self.give_api(path)
        elif path.startswith("/lfs/"):
            server.blobs[path.rpartition("/")[2]] = self.body
            self.give({})
        else:
            self.give_file(path, with_body)

    def give_file(self, path, with_body):
        server, fault = self.server, self.server.fault
        repository, resolve, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        known = resolve and self.may_read(repository)
        files = self.files_of(repository) if known else {}
        commit = server.commits.get(repository, COMMIT)
        if isinstance(fault, int):
            self.give(None, fault, "RepoNotFound" if fault == 404 else None)
        elif not known:
            self.give(None, 404, "RepoNotFound")
        elif revision not in ("main", commit):
            self.give(None, 404, "RevisionNotFound")
        elif name not in files:
            self.give(None, 404, "EntryNotFound")
        else:
            body = files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if fault in ("cut", "cut once") else body)
                if fault == "cut once":
                    server.fault = None

    def give_api(self, path):
        if path == "/api/whoami-v2":
            if not self.is_user():
                self.give({"error": "Invalid credentials"}, 401)
            else:
                self.give({"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}]})
        elif path == "/api/validate-yaml":
            self.give({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body))
        elif path.endswith("/info/lfs/objects/batch"):
            address = f"http://127.0.0.1:{self.server.server_port}/lfs"
            objects = json.loads(self.body)["objects"]
            for each in objects:
                if each["oid"] not in self.server.blobs:
                    each["actions"] = {"upload": {"href": f"{address}/{each['oid']}"}}
            self.give({"transfer": "basic", "objects": objects})
        else:
            namespace, name, *action = path.removeprefix("/api/models/").split("/")
            self.give_model(f"{namespace}/{name}", action)

    def give_model(self, repository, action):
        server = self.server
        if not self.may_read(repository):
            self.give({"error": "Repository not found"}, 404, "RepoNotFound")
            return
        files = self.files_of(repository)
        if action[:1] == ["preupload"]:
            large = (".safetensors", ".png")
            self.give({"files": [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                    "oid": self.oid(each["path"], files),
                }
                for each in json.loads(self.body)["files"]
            ]})  # fmt: skip
        elif action[:1] == ["commit"]:
            if not self.is_user():
                self.give({"error": "Forbidden"}, 403)
                return
            files = dict(files)
            for line in self.body.decode().splitlines():
                key, value = (json.loads(line)[part] for part in ("key", "value"))
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = server.blobs[value["oid"]]
            server.files[repository] = files
            text = repr(sorted((name, hashlib.sha256(files[name]).hexdigest()) for name in files))
            server.commits[repository] = hashlib.sha1(text.encode()).hexdigest()
            self.give({
                "commitUrl": f"http://127.0.0.1:{server.server_port}/{repository}/commit/1",
                "commitOid": server.commits[repository],
            })  # fmt: skip
        else:
            self.give({
                "id": repository,
                "sha": server.commits.get(repository, COMMIT),
                "private": repository in server.private,
                "siblings": [{"rfilename": name} for name in files],
            })  # fmt: skip

    def create(self, asked):
        server = self.server
        repository = f"{asked['organization'] or USER}/{asked['name']}"
        address = {"url": f"http://127.0.0.1:{server.server_port}/{repository}"}
        if repository.partition("/")[0] not in (USER, ORGANISATION) or not self.is_user():
            self.give({"error": "You don't have the rights to create a model"}, 403)
        elif repository in server.files:
            self.give({"error": "You already created this model repo", **address}, 409)
        else:
            server.files[repository] = {".gitattributes": b"*.safetensors filter=lfs"}
            if asked.get("private") or asked.get("visibility") == "private":
                server.private.add(repository)
            self.give(address)

    def is_user(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_read(self, repository):
        server = self.server
        return repository in server.files and (repository not in server.private or self.is_user())

    def files_of(self, repository):
        found = self.server.files[repository]
        return {"model.safetensors": found} if isinstance(found, bytes) else found

    def oid(self, name, files):
        """Git's name of a file's content, as the hub says it of the files that it has."""
        if name not in files:
            return None
        if hashlib.sha256(files[name]).hexdigest() in self.server.blobs:
            return hashlib.sha256(files[name]).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(files[name]) + files[name]).hexdigest()

    def give(self, value, status=200, code=None):
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_hub(files):
    """The running server; its address is `http://127.0.0.1:{server.server_port}`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.fault, server.requests = files, None, []
    server.closed = threading.Event()
    server.commits, server.blobs, server.private = {}, {}, set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(monkeypatch, port, cache):
    """Has `huggingface_hub` of this process ask a server on this machine, with another cache."""
    from huggingface_hub import constants, file_download

    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # not in 0.30
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
