"""Three processes, connected: what one publishes all know, and how one ends is known to all."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cait_jax import relay

ROOT = Path(__file__).parents[1]
PROCESS = """
import os, signal, sys, time
from cait_jax.peers import Peers
from cait_jax.rendezvous import meet

port, index, end = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def leave(sentence):
    print("ended:", sentence, flush=True)
    os._exit(1)

meeting = meet("127.0.0.1", port, 3, index, 20.0)
peers = Peers(meeting, index=index, end=leave)
while len(found := peers.exchange(f"place {index}", {"number": index})) < 3:
    time.sleep(0.02)
print(sorted(found.items()), flush=True)
for _ in range(10):  # until the others know it too
    peers.exchange(f"place {index}", {"number": index})
    time.sleep(0.02)
if index == 1:
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "all":
        peers.end_all("everyone ends")
    if end == "error":
        peers.end_others("process 1 fails")
        print("fails by itself", flush=True)
        os._exit(3)
    if end == "leave":
        peers.leave()
        os._exit(0)
print("verdict:", peers.verdict(1.5), flush=True)
time.sleep(30 if end != "leave" else 0)
"""
HOST = socket.gethostname()


def run(end):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index), end],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    said = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    everyone = str([(index, {"number": index}) for index in range(3)])
    assert [lines.pop(0) for lines in said] == [everyone] * 3
    return said, [process.returncode for process in processes]


def test_a_death_ends_all_others_by_name():
    said, status = run("kill")
    assert status == [1, -signal.SIGKILL, 1]
    for first, last in (said[0], said[2]):
        assert first.startswith(f"verdict: process 1 on {HOST} has ended, last in place 1: ")
        assert last.removeprefix("ended: ") == first.removeprefix("verdict: ")


def test_a_verdict_ends_all():
    said, status = run("all")
    assert status == [1, 1, 1]
    assert all(lines == ["verdict: everyone ends", "ended: everyone ends"] for lines in said)


def test_who_fails_ends_by_its_own_words_and_the_others_by_its_name():
    said, status = run("error")
    assert status == [1, 3, 1]
    assert said[1] == ["fails by itself"]
    assert said[0] == said[2] == ["verdict: process 1 fails", "ended: process 1 fails"]


def test_who_has_done_its_part_is_not_missed():
    said, status = run("leave")
    assert status == [0, 0, 0]
    assert said == [["verdict: "], [], ["verdict: "]]


def test_the_relay_keeps_a_client_whose_server_is_gone_and_ends_with_its_process():
    """JAX's client would abort its process."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        host, port = later.getsockname()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", relay.__file__, str(listening.fileno()), host, str(port)],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
        client = socket.create_connection(listening.getsockname())
        client.settimeout(10)
        client.sendall(b"hello")
        time.sleep(0.2)
        later.listen()  # the server starts later than its client
        server, _ = later.accept()
        assert server.recv(5) == b"hello"
        server.sendall(b"answer")
        assert client.recv(6) == b"answer"
        process.send_signal(signal.SIGTERM)
        server.close()
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 0
        client.close()
