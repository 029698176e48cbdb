"""All processes of a run have started, or each says which have not."""

import socket
import threading
import time

import pytest

from cait_jax import UserError
from cait_jax.rendezvous import listen, meet

HOST = "127.0.0.1"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def run(port, numbers, *, count, seconds=5.0, counts=None):
    """What each process ends with: the processes that it is connected to, or its sentence."""
    found = {}

    def one(place, index):
        try:
            meeting = meet(HOST, port, (counts or {}).get(place, count), index, seconds)
            found[place] = sorted(meeting.connections)
            assert set(meeting.hosts.values()) == {socket.gethostname()}
            closing.extend(meeting.connections.values())
            services.add(meeting.service)
        except UserError as error:
            found[place] = str(error)

    closing, services = [], set()
    threads = [
        threading.Thread(target=one, args=(place, index)) for place, index in enumerate(numbers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for connection in closing:
        connection.close()
    assert len(found) == len(numbers)
    assert len(services) <= 1
    return [found[place] for place in range(len(numbers))]


class Gathering:
    """Process 0, in a thread."""

    def __init__(self, port, count):
        self.meetings = []
        self.thread = threading.Thread(
            target=lambda: self.meetings.append(meet(HOST, port, count, 0, 10.0))
        )
        self.thread.start()

    def finish(self):
        self.thread.join(20)
        (meeting,) = self.meetings
        for connection in meeting.connections.values():
            connection.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_once_all_are_there_connected_to_process_0(port, order):
    expected = {0: [1, 2], 1: [0], 2: [0]}
    assert run(port, order, count=3) == [expected[index] for index in order]


def test_those_that_have_not_started_are_named_by_all_others(port):
    said = run(port, (0, 2), count=4, seconds=0.5)
    assert all("processes 1, 3 did not start within 0 s" in sentence for sentence in said), said


def test_without_process_0_the_others_name_it_and_its_address(port):
    (said,) = run(port, (1,), count=2, seconds=0.5)
    assert "process 0 did not start" in said
    assert f"--coordinator={HOST}:{port}" in said


def test_two_of_one_number_and_two_counts_are_refused(port):
    assert all("two processes have --process=1" in s for s in run(port, (0, 1, 1), count=3))
    said = run(port, (0, 1), count=2, counts={1: 3})
    assert all("has --processes=3 and process 0 has 2" in sentence for sentence in said)


def test_a_process_started_again_takes_its_place(port):
    first = Gathering(port, 3)
    for _ in range(100):
        try:
            with socket.create_connection((HOST, port)) as gone:
                gone.sendall(b'{"process": 1, "processes": 3}\n')
            break
        except OSError:
            time.sleep(0.01)
    assert run(port, (1, 2), count=3) == [[0], [0]]
    first.finish()


def test_others_who_connect_are_passed_over(port):
    first = Gathering(port, 2)
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process": "x"}\n',
        b"[" * 1900 + b"\n",
        b"\xff\xfe\n",
    ):
        for _ in range(100):
            try:
                with socket.create_connection((HOST, port)) as other:
                    other.sendall(said)
                break
            except OSError:
                time.sleep(0.01)
    assert run(port, (1,), count=2) == [[0]]
    first.finish()


def test_an_address_of_another_machine_and_a_port_in_use_are_refused(port):
    with socket.create_server((HOST, port)), pytest.raises(UserError, match="a port that is free"):
        meet(HOST, port, 2, 0, 1.0)
    with pytest.raises(UserError, match="give an address of this machine"):
        meet("192.0.2.1", port, 2, 0, 1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_process_0_listens_at_its_address_alone(port, host):
    with listen(host, port) as server:
        assert server.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.parametrize("bind", ["0.0.0.0", "::"])
def test_every_interface_where_that_is_asked_for(port, bind):
    with listen(HOST, port, bind=bind) as server:
        assert server.getsockname()[0] in ("0.0.0.0", "::")
        socket.create_connection((HOST, port)).close()


def test_a_name_that_only_this_machine_gives_itself_is_not_bound_where_nobody_reaches_it(
    monkeypatch, port
):
    """Debian's /etc/hosts has 127.0.1.1 for the host's own name."""
    own = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: own)
        server = listen("node1", port)
    with server:
        assert server.getsockname()[0] in ("0.0.0.0", "::")
