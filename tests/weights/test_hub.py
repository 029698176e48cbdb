"""Downloads from a server on this machine that answers as the hub does."""

import dataclasses
import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from cait_jax.errors import UserError
from cait_jax.weights.files import read_weights, write_safetensors
from cait_jax.weights.hub import download
from cait_jax.weights.released import find_released

ROW = find_released("cait_xxs24_224")
COMMIT = "c" * 40
WEIGHTS = {"head.weight": np.arange(3000, dtype=np.float32).reshape(30, 100)}


class Hub(BaseHTTPRequestHandler):
    """One repository with one file. `server.fault` is what goes wrong: a status, or `"cut"`, or `"cut once"`."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server = self.server
        server.requests.append((self.command, self.path))
        wanted = f"/{ROW.hub_id}/resolve/"
        fault = server.fault
        if isinstance(fault, int) or not self.path.startswith(wanted):
            self.send_response(fault if isinstance(fault, int) else 404)
            if fault == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.body
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.body = (tmp_path / "model.safetensors").read_bytes()
    server.fault, server.requests = None, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def point_at(monkeypatch, port):
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_file_is_downloaded_once(hub):
    file = download(ROW)
    np.testing.assert_array_equal(read_weights(file)["head.weight"], WEIGHTS["head.weight"])
    assert hub.requests[-1] == ("GET", f"/{ROW.hub_id}/resolve/main/model.safetensors")
    hub.requests.clear()
    assert download(ROW) == file
    assert {command for command, _ in hub.requests} == {"HEAD"}


def test_a_pinned_revision_in_the_cache_is_not_asked_for_again(hub):
    pinned = dataclasses.replace(ROW, revision=COMMIT)
    file = download(pinned)
    assert all(f"/resolve/{COMMIT}/" in path for _, path in hub.requests)
    hub.requests.clear()
    assert download(pinned) == file
    assert hub.requests == []


def test_the_sum_of_the_table_is_held(hub):
    digest = hashlib.sha256(hub.body).hexdigest()
    assert download(dataclasses.replace(ROW, sha256=digest)).is_file()
    with pytest.raises(
        UserError, match=rf"has SHA-256 {digest} instead of 0000.*: remove .* again"
    ):
        download(dataclasses.replace(ROW, sha256="0" * 64))


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, r"refused .* \(HTTP 404\): check that it exists .* weights=PATH"),
        (403, r"refused .* \(HTTP 403\): check that it exists and may be read"),
        (500, r"refused .* \(HTTP 500\): try again later, or give weights=PATH"),
    ],
)
def test_a_refusal_is_said_in_one_sentence(hub, status, sentence):
    hub.fault = status
    with pytest.raises(UserError, match=sentence) as caught:
        download(ROW)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) == 1


def test_a_download_cut_off_is_tried_again(hub):
    hub.fault = "cut once"
    assert read_weights(download(ROW))


def test_a_download_that_breaks_off_leaves_no_file(hub, tmp_path):
    hub.fault = "cut"
    with pytest.raises(UserError, match=r"broke off \(.*\): try again, .* weights=PATH") as caught:
        download(ROW)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.fault = None
    assert read_weights(download(ROW))


def test_offline_takes_the_cache_and_never_the_network(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the cache .* HF_HUB_OFFLINE forbids .* unset it"):
        download(ROW)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    file = download(ROW)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(ROW) == file
    assert hub.requests == []


def test_without_a_network_the_cache_serves_and_otherwise_the_answer_comes_at_once(
    hub, monkeypatch
):
    port = hub.server_port
    point_at(monkeypatch, free_port())
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .* connect to the network, set HF_HUB"):
        download(ROW)
    assert time.monotonic() - start < 5
    point_at(monkeypatch, port)
    file = download(ROW)
    hub.fault = 503
    assert download(ROW) == file
    point_at(monkeypatch, free_port())
    assert download(ROW) == file
