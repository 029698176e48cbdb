"""All processes of a run have started: known before JAX waits for them, and of those that have not, which.

JAX's coordination service does not tell which process is missing, and ends the others by an abort. So they meet at
its address first, over TCP, where process 0 listens.
"""

import dataclasses
import ipaddress
import json
import socket
import time

from cait_jax.errors import UserError

_PAUSE_S = 0.1
_LONGEST_LINE = 2000
_SPEAKS_WITHIN_S = 5.0


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The open connections of a process.

    Attributes:
      connections: of process 0 to all others, of these to process 0, by number.
      hosts: the host names at their other ends, by number.
      service: host and free port of process 0 for JAX's coordination service.
      bind: the address of this machine for it, in process 0.
    """

    connections: dict[int, socket.socket]
    hosts: dict[int, str]
    service: tuple[str, int]
    bind: str = ""


def meet(
    host: str, port: int, count: int, index: int, seconds: float, *, bind: str | None = None
) -> Meeting:
    """Returns in each of `count` processes once all have called it.

    Args:
      host: of process 0, which listens there.
      index: of this process, from 0.
      seconds: to wait at most.
      bind: another address for process 0 to listen at; "0.0.0.0" or "::" for every interface.

    Raises:
      UserError: in each process, naming those that have not started; or process 0 cannot listen, or two have the
        same number.
    """
    deadline = time.monotonic() + seconds
    if index == 0:
        return _gather(host, port, count, seconds, deadline, bind)
    return _report(host, port, count, index, seconds, deadline)


def listen(host: str, port: int, *, bind: str | None = None, backlog: int = 128) -> socket.socket:
    """A server at an address of this machine, and at no other of its interfaces.

    A name that this machine gives itself on its loopback device, as Debian does, has no address here that others
    reach: then at every interface.
    """
    name = host if bind is None else bind
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    places = {place[0]: family for family, _, _, _, place in found}
    apart = [place for place in places if not ipaddress.ip_address(place).is_loopback]
    place = (apart or list(places))[0]
    if ipaddress.ip_address(place).is_unspecified or not (apart or _is_loopback(name)):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=backlog)
    return socket.create_server((place, port), family=places[place], backlog=backlog)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.startswith("localhost.")


def _gather(
    host: str, port: int, count: int, seconds: float, deadline: float, bind: str | None
) -> Meeting:
    try:
        server = listen(host, port, bind=bind, backlog=max(128, 2 * count))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at --coordinator={host}:{port} ({_reason(error)}): give an address of this "
            "machine and a port that is free"
        ) from error
    present: dict[int, socket.socket] = {}
    hosts: dict[int, str] = {}
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
            problem = (
                f"two processes have --process={number}, one on {peer}: count from 0 to {count - 1}"
            )
            present[-1] = connection
        else:
            present[number] = connection
            hosts[number] = str(said.get("host") or peer)
    place, *_ = server.getsockname()
    server.close()
    with socket.create_server((place, 0), family=server.family) as free:
        service = free.getsockname()[1]
    answer = {"problem": problem} if problem else {"host": socket.gethostname(), "service": service}
    for connection in present.values():
        try:
            connection.settimeout(_SPEAKS_WITHIN_S)
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            continue  # its end is noticed by who holds the connection
    if problem:
        for connection in present.values():
            connection.close()
        raise UserError(problem)
    return Meeting(present, hosts, (host, service), place)


def _report(
    host: str, port: int, count: int, index: int, seconds: float, deadline: float
) -> Meeting:
    introduction = {"process": index, "processes": count, "host": socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
        answer = ""
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except OSError:
            connection = None
        if connection is not None:
            try:
                connection.sendall(json.dumps(introduction).encode() + b"\n")
                # Process 0 may have begun to wait later, and speaks then.
                connection.settimeout(seconds + _SPEAKS_WITHIN_S)
                answer = _line(connection)
            except OSError:
                pass
            found = _object(answer)
            service = found.get("service")
            if isinstance(service, int):
                return Meeting({0: connection}, {0: str(found.get("host"))}, (host, service))
            connection.close()
            if isinstance(found.get("problem"), str):
                raise UserError(str(found["problem"]))
            if answer:
                raise UserError(
                    f"what listens at --coordinator={host}:{port} is no run that starts: give a port that is free"
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
        return _object(_line(connection))
    except OSError:
        return {}


def _object(line: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(connection: socket.socket) -> str:
    """The first line received, "" if there is none. What follows it is left in the connection."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _LONGEST_LINE:
        part = connection.recv(1)
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
