"""All processes of a run have started, or each says which have not."""

import socket
import threading
import time

import pytest

from cait_jax import UserError
from cait_jax.rendezvous import meet

HOST = "127.0.0.1"


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def run(port, numbers, *, count, seconds=5.0, counts=None):
    """What each process ends with: None, or its sentence."""
    found = {}

    def one(place, index):
        try:
            meet(HOST, port, (counts or {}).get(place, count), index, seconds)
            found[place] = None
        except UserError as error:
            found[place] = str(error)

    threads = [
        threading.Thread(target=one, args=(place, index)) for place, index in enumerate(numbers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == len(numbers)
    return [found[place] for place in range(len(numbers))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_once_all_are_there_and_the_port_is_free_again(port, order):
    assert run(port, order, count=3) == [None] * 3
    with socket.create_server((HOST, port)):
        pass


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
    first = threading.Thread(target=meet, args=(HOST, port, 3, 0, 10.0))
    first.start()
    for _ in range(100):
        try:
            with socket.create_connection((HOST, port)) as gone:
                gone.sendall(b'{"process": 1, "processes": 3}\n')
            break
        except OSError:
            time.sleep(0.01)
    assert run(port, (1, 2), count=3) == [None] * 2
    first.join(20)
    assert not first.is_alive()


def test_others_who_connect_are_passed_over(port):
    first = threading.Thread(target=meet, args=(HOST, port, 2, 0, 10.0))
    first.start()
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
    assert run(port, (1,), count=2) == [None]
    first.join(20)
    assert not first.is_alive()


def test_an_address_of_another_machine_and_a_port_in_use_are_refused(port):
    with socket.create_server((HOST, port)), pytest.raises(UserError, match="a port that is free"):
        meet(HOST, port, 2, 0, 1.0)
    with pytest.raises(UserError, match="give an address of this machine"):
        meet("192.0.2.1", port, 2, 0, 1.0)
