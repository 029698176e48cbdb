"""All processes of a run have started: known before JAX waits for them, and of those that have not, which.

JAX's coordination service does not tell which process is missing, and ends the others by an abort. So they meet at
its address first, over TCP: process 0 listens there until it has heard of every other, and then leaves the port to
JAX.
"""

import json
import socket
import time

from cait_jax.errors import UserError

_READY = "ready"
_PAUSE_S = 0.1
_LONGEST_LINE = 2000
_SPEAKS_WITHIN_S = 5.0


def meet(host: str, port: int, count: int, index: int, seconds: float) -> None:
    """Returns in each of `count` processes once all have called it.

    Args:
      host: of process 0, which listens there.
      index: of this process, from 0.
      seconds: to wait at most.

    Raises:
      UserError: in each process, naming those that have not started; or process 0 cannot listen, or two have the
        same number.
    """
    deadline = time.monotonic() + seconds
    if index == 0:
        _gather(host, port, count, seconds, deadline)
    else:
        _report(host, port, count, index, seconds, deadline)


def _gather(host: str, port: int, count: int, seconds: float, deadline: float) -> None:
    try:
        family, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = socket.create_server(place[:2], family=family, backlog=count)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at --coordinator={host}:{port} ({_reason(error)}): give an address of this "
            "machine and a port that is free"
        ) from error
    present: dict[int, socket.socket] = {}
    with server:
        problem = ""
        while len(present) < count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, (peer, *_) = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - set(present))
                problem = _not_started(missing, seconds)
                break
            said = _introduction(connection)
            number = said.get("process")
            for gone in [i for i, other in present.items() if not _is_open(other)]:
                present.pop(gone).close()
            if not isinstance(number, int) or not 0 <= number < count:
                connection.close()  # whoever it is
            elif said.get("processes") != count:
                problem = (
                    f"process {number} on {peer} has --processes={said.get('processes')} and process 0 has "
                    f"{count}: give all the same"
                )
                present[number] = connection
            elif number == 0 or number in present:
                problem = f"two processes have --process={number}, one on {peer}: count from 0 to {count - 1}"
                present[-1] = connection
            else:
                present[number] = connection
        for connection in present.values():
            with connection:
                try:
                    connection.sendall(f"{problem or _READY}\n".encode())
                except OSError:
                    continue
    if problem:
        raise UserError(problem)


def _report(host: str, port: int, count: int, index: int, seconds: float, deadline: float) -> None:
    introduction = json.dumps({"process": index, "processes": count}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(introduction)
                # Process 0 may have begun to wait later, and speaks then.
                connection.settimeout(seconds + _SPEAKS_WITHIN_S)
                answer = _line(connection)
        except OSError:
            answer = ""
        if answer == _READY:
            return
        if answer:
            raise UserError(
                answer
                if answer.isprintable()
                else f"what listens at --coordinator={host}:{port} is no run that starts: give a port that is free"
            )
        time.sleep(_PAUSE_S)
    raise UserError(f"{_not_started([0], seconds)}; it is to listen at --coordinator={host}:{port}")


def _not_started(missing: list[int], seconds: float) -> str:
    few = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return (
        f"process{'es' * (len(missing) > 1)} {few} did not start within {seconds:.0f} s "
        "(--config.watchdog.start_seconds): start every process, and see what these printed"
    )


def _introduction(connection: socket.socket) -> dict[str, object]:
    connection.settimeout(_SPEAKS_WITHIN_S)
    try:
        found = json.loads(_line(connection))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(connection: socket.socket) -> str:
    """The first line received, "" if there is none."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _LONGEST_LINE:
        part = connection.recv(_LONGEST_LINE)
        if not part:
            break
        found += part
    return found.decode(errors="replace").strip()


def _is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.0)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
