"""A server on this machine that answers as the Hugging Face hub does."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """`server.files` maps a repository to the bytes of its `model.safetensors`.

    `server.fault` is what goes wrong: a status, or `"cut"`, or `"cut once"`.
    """

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server = self.server
        server.requests.append((self.command, self.path))
        repository, resolve, _ = self.path[1:].partition("/resolve/")
        fault = server.fault
        if isinstance(fault, int) or not resolve or repository not in server.files:
            self.send_response(fault if isinstance(fault, int) else 404)
            if fault == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.files[repository]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "cut once") else body)
            if fault == "cut once":
                server.fault = None
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_hub(files):
    """The running server; its address is `http://127.0.0.1:{server.server_port}`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.fault, server.requests = files, None, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
