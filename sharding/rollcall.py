"""Who is there: the processes of a run call in before jax starts, and stay on the line after.

``jax.distributed.initialize`` ends a process that waits in vain with a C++ abort, which names
nobody and which Python cannot catch (jax 0.10 and 0.12). So the processes find each other here
first, by plain TCP on the very port that jax is going to use: process 0 listens, the others call
and say who they are. Process 0 knows who came, who did not, who came twice and who was told
another number of processes, and says so to everybody; then it frees the port for jax.

The connections stay open while the run lasts. The kernel closes those of a process that dies,
however it dies, so the others learn of it at once and end with a message. jax alone leaves them
in their collective until its heartbeats run out (100 seconds), and a process that raised an
error waits for them in its exit for five minutes.

Cost: one connection a process, and a thread that sleeps. The alternative, jax's own key-value
store, is there only once all processes have come.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from meshwright.sharding.errors import ProcessesError

__all__ = ["Lifeline", "Seat", "call_in", "is_loopback", "may_listen_at"]

_REPORT_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 3.0
# So much longer may a process take that is failing itself.
_GRACE_SECONDS = 1.0
# News of another's end may come a little after the error that it makes here.
_NEWS_SECONDS = 0.3
# Process 0 goes last: jax aborts the others, with a stack trace of its own, when it misses it.
_LAST_SECONDS = 1.5
_LATER_SECONDS = 2.0
_LATE_SECONDS = 30.0
_LONGEST_LINE_BYTES = 65536
_SHOWN = 8


@dataclass(frozen=True)
class Seat:
    """One process's place in a run.

    Attributes:
        index: its number, from 0.
        count: processes of the run.
        host, port: where process 0 listens.
        timeout_seconds: how long to wait for the others.
    """

    index: int
    count: int
    host: str
    port: int
    timeout_seconds: float

    @property
    def report_seconds(self) -> float:
        """How often to say what is waited for."""
        return min(_REPORT_SECONDS, self.timeout_seconds / 3)

    @property
    def address(self) -> str:
        """Where process 0 listens, as people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass
class _Line:
    """A connection that carries JSON objects, one a line."""

    socket: socket.socket
    who: dict[str, Any] = field(default_factory=dict)
    _rest: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, at least one read's worth; None when the other end has gone."""
        try:
            more = self.socket.recv(4096)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not more or len(self._rest) > _LONGEST_LINE_BYTES:
            return None
        *lines, self._rest = (self._rest + more).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None  # some other program
        return found if all(isinstance(message, dict) for message in found) else None


class Lifeline:
    """The connections of a started run: tells the others of a failure, and hears of theirs.

    Args:
        seat: this process's.
        lines: process 0's to every other; theirs to process 0.
    """

    def __init__(self, seat: Seat, lines: list[_Line]) -> None:
        self._seat, self._lines = seat, lines
        self._pid = os.getpid()
        self._failed: int | None = None
        self._stopped: int | None = None
        self._done = False
        for line in lines:
            _keep_alive(line.socket)
        threading.Thread(target=self._watch, name="meshwright-lifeline", daemon=True).start()

    def fail(self, text: str, code: int = 1) -> None:
        """Tell the others that this process ends with an error; they end too.

        Does not return if another one failed first: this error is then only what a collective
        says when a process is gone, and why has been said.

        Args:
            text: one line for people.
            code: exit code of this process, which `leave` ends it with.
        """
        if os.getpid() != self._pid or self._done or self._failed is not None:
            return
        time.sleep(_NEWS_SECONDS)
        if self._stopped is not None:
            time.sleep(self._longer())
            _end(self._stopped)
        self._failed = code
        self._tell({"failed": text, "process": self._seat.index, "code": code})

    def leave(self) -> None:
        """At exit: end at once after a failure, or tell the others that all went well."""
        if os.getpid() != self._pid:
            return  # a forked child
        if self._failed is not None:
            time.sleep(self._longer())
            _end(self._failed)
        self._done = True
        self._tell({"done": True})

    def _tell(self, message: dict[str, Any]) -> None:
        for line in list(self._lines):
            line.send(message)

    def _watch(self) -> None:
        waiting = selectors.DefaultSelector()
        for line in self._lines:
            line.socket.settimeout(None)
            waiting.register(line.socket, selectors.EVENT_READ, line)
        finished: dict[int, float] = {}
        while waiting.get_map():
            for key, _ in waiting.select(timeout=_REPORT_SECONDS):
                line: _Line = key.data
                messages = line.receive()
                for message in messages or ():
                    if "done" not in message:
                        self._stop(message)
                    finished[line.who["process"]] = time.monotonic()
                if messages is None:
                    waiting.unregister(line.socket)
                    if line.who["process"] not in finished:
                        self._stop({"process": line.who["process"], "died": line.who["name"]})
            self._say_who_finished(finished)

    def _say_who_finished(self, finished: dict[int, float]) -> None:
        for index, since in finished.items():
            if time.monotonic() - since > _LATE_SECONDS and not self._done:
                finished[index] = float("inf")
                _say(
                    self._seat,
                    f"process {index} ended {_LATE_SECONDS:.0f} s ago and this one is still at "
                    "work; if it hangs, the two were given different numbers of steps or batches",
                )

    def _stop(self, message: dict[str, Any]) -> None:
        """End this process because another one failed, after passing that on."""
        self._tell(message)
        if self._done or self._failed is not None:
            return
        # At once: what this process runs into now that the other is gone says much less.
        _say(self._seat, f"stopping, because {_what_happened(message)}")
        self._stopped = int(message.get("code", 1))
        time.sleep(_GRACE_SECONDS + self._longer())
        if not self._done:
            _end(self._stopped)

    def _longer(self) -> float:
        return _LAST_SECONDS if self._seat.index == 0 else 0.0


def call_in(seat: Seat) -> Lifeline:
    """Wait until every process of the run is there.

    Raises:
        ProcessesError: one did not come in time, came twice, or was told another number of
            processes; the port is taken; process 0 cannot be reached. All processes that came
            get the same error.
    """
    lines = _listen(seat) if seat.index == 0 else [_call(seat)]
    return Lifeline(seat, lines)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means the host itself, whichever that is.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("10.0.0.1")
    (True, True, False)
    """
    return host in ("localhost", "ip6-localhost", "::1") or host.startswith("127.")


def may_listen_at(host: str) -> bool:
    """Whether a name or address is this machine's own; also when it cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as trial:
            trial.bind((address[0], 0, *address[2:]))
            return True
    return False


def _listen(seat: Seat) -> list[_Line]:
    """Process 0's part."""
    hall = _Hall(seat)
    try:
        return hall.wait()
    except ProcessesError as error:
        parts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        hall.tell({"error": parts})
        raise
    finally:
        hall.close()


class _Hall:
    """Where processes arrive at process 0."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._server = _open_port(seat)
        self._server.setblocking(False)
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._server, selectors.EVENT_READ)
        self._strangers: list[_Line] = []
        self._came: dict[int, _Line] = {}

    def wait(self) -> list[_Line]:
        seat, began = self._seat, time.monotonic()
        told = began
        while len(self._came) < seat.count - 1:
            for key, _ in self._waiting.select(timeout=0.5):
                self._accept() if key.data is None else self._hear(key.data)
            now = time.monotonic()
            if now - began > seat.timeout_seconds:
                raise self._too_late()
            if now - told > seat.report_seconds and self.missing:
                told = now
                _say_waiting(seat, _some(self.missing), now - began)
                self.tell(self._state())
        self.tell({"go": True})
        return [self._came[index] for index in sorted(self._came)]

    @property
    def missing(self) -> list[int]:
        return [index for index in range(1, self._seat.count) if index not in self._came]

    def _state(self) -> dict[str, Any]:
        return {"missing": _some(self.missing), "count": len(self.missing)}

    def tell(self, message: dict[str, Any]) -> None:
        for line in (*self._came.values(), *self._strangers):
            line.send(message)

    def close(self) -> None:
        self._waiting.close()
        self._server.close()
        for line in self._strangers:
            line.socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.settimeout(_CONNECT_SECONDS)
            line = _Line(connection)
            self._strangers.append(line)
            self._waiting.register(connection, selectors.EVENT_READ, line)

    def _hear(self, line: _Line) -> None:
        messages = line.receive()
        if messages is None:
            self._waiting.unregister(line.socket)
            line.socket.close()
            if line in self._strangers:
                self._strangers.remove(line)
            elif line.who:
                del self._came[line.who["process"]]
        elif messages and line in self._strangers:
            self._greet(line, messages[0])

    def _greet(self, line: _Line, hello: dict[str, Any]) -> None:
        seat = self._seat
        if not all(isinstance(hello.get(key), int) for key in ("process", "processes")):
            return
        index, name = hello["process"], str(hello.get("name"))
        before = self._came.get(index)
        if hello["processes"] != seat.count:
            raise ProcessesError(
                "cannot start: the processes do not agree how many they are",
                where=f"process 0 ({_name()}) and process {index} ({name})",
                why=f"process 0 was told {seat.count} processes, process {index} was told "
                f"{hello['processes']}",
                fix="start every process with the same number (MESHWRIGHT_PROCESSES)",
            )
        if before is not None or index == 0:
            other = _name() if before is None else before.who["name"]
            raise ProcessesError(
                f"cannot start: two processes say that they are process {index}",
                where=f"{other} and {name}",
                why="each process needs a number of its own",
                fix=f"number them 0 to {seat.count - 1} (MESHWRIGHT_PROCESS); if one is left from "
                "an earlier start, end it first",
            )
        line.who = {"process": index, "name": name}
        self._strangers.remove(line)
        self._came[index] = line
        if self.missing:
            line.send(self._state())

    def _too_late(self) -> ProcessesError:
        seat = self._seat
        came = [f"0 ({_name()})"]
        came += [f"{i} ({line.who['name']})" for i, line in sorted(self._came.items())]
        hints = []
        if is_loopback(seat.host):
            hints.append(f"`{seat.host}` is reached from this host alone")
        elif not may_listen_at(seat.host):
            hints.append(f"`{seat.host}` is no address of this host, where process 0 runs")
        return _missing(seat, _some(came), self._state(), hints)


def _missing(seat: Seat, came: str, state: dict[str, Any], hints: list[str]) -> ProcessesError:
    return ProcessesError(
        f"cannot start: {state['count']} of {seat.count} processes did not come within "
        f"{seat.timeout_seconds:g} s",
        where=f"coordinator {seat.address}; came: {came}; did not come: process {state['missing']}",
        why="; ".join(
            ["they were not started, ended early, or cannot reach the coordinator", *hints]
        ),
        fix="look at the output of those that did not come; from their host, try "
        f"`nc -vz {seat.host} {seat.port}` while process 0 waits; the number of processes, "
        f"{seat.count}, must be the number started",
    )


def _open_port(seat: Seat) -> socket.socket:
    """Listen where jax's service is going to, on every address of this host."""
    chosen = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    both = socket.has_dualstack_ipv6() and chosen in ("", "::")
    family = socket.AF_INET6 if both or ":" in chosen else socket.AF_INET
    try:
        return socket.create_server(
            (chosen, seat.port), family=family, backlog=1024, dualstack_ipv6=both
        )
    except OSError as error:
        raise ProcessesError(
            f"cannot start: process 0 cannot listen on port {seat.port}",
            where=f"coordinator {seat.address}, this host is {socket.gethostname()}",
            why=f"{error.strerror}: another program has the port, such as an earlier run or a "
            "second process 0"
            if "in use" in str(error.strerror)
            else str(error.strerror),
            fix="end the other program, or choose another port for all processes",
        ) from None


def _call(seat: Seat) -> _Line:
    """The part of every process but 0."""
    began = told = time.monotonic()
    heard, state = "nothing was tried", {}
    while time.monotonic() - began <= seat.timeout_seconds:
        try:
            connection = socket.create_connection((seat.host, seat.port), _CONNECT_SECONDS)
        except OSError as error:
            late = isinstance(error, TimeoutError)
            heard = "no answer" if late else error.strerror or str(error)
        else:
            line = _Line(connection, {"process": 0, "name": seat.address})
            state = {}
            if (heard := _wait_for_go(seat, line, began, state)) is None:
                return line
            connection.close()
        if time.monotonic() - told > seat.report_seconds:
            told = time.monotonic()
            _say(seat, f"waiting for process 0 at {seat.address}: {heard}")
        time.sleep(_RETRY_SECONDS)
    if state:
        raise _missing(seat, f"0, {seat.index} ({_name()})", state, [])
    alone = ", which is this host itself, whichever it is" if is_loopback(seat.host) else ""
    raise ProcessesError(
        f"cannot start: process {seat.index} of {seat.count} did not reach process 0 within "
        f"{seat.timeout_seconds:g} s",
        where=f"coordinator {seat.address}{alone}",
        why=heard,
        fix="check that process 0 was started, that all processes have the same coordinator "
        "(MESHWRIGHT_COORDINATOR) with the name of process 0's host, and that a firewall lets "
        f"port {seat.port} through",
    )


def _wait_for_go(seat: Seat, line: _Line, began: float, state: dict[str, Any]) -> str | None:
    """None once all came; else why process 0 said nothing of the kind. Fills in who is missing."""
    line.socket.settimeout(0.5)
    line.send({"process": seat.index, "processes": seat.count, "name": _name()})
    told = began
    # Process 0's own error says more than ours; it may have begun to wait later than we.
    while time.monotonic() - began <= seat.timeout_seconds + _LATER_SECONDS:
        messages = line.receive()
        if messages is None:
            return "it hung up: process 0 ended, or something else has that port"
        for message in messages:
            if "go" in message:
                return None
            if isinstance(message.get("error"), dict):
                parts = {key: str(value) for key, value in message["error"].items()}
                raise ProcessesError(parts.pop("what", "cannot start"), **parts)
            state |= message
        if state and time.monotonic() - told > seat.report_seconds:
            told = time.monotonic()
            _say_waiting(seat, str(state.get("missing")), told - began)
    return "something answers there that is no process of this run"


def _say_waiting(seat: Seat, missing: str, seconds: float) -> None:
    _say(
        seat,
        f"waiting for process {missing} of {seat.count} ({seconds:.0f} s; "
        f"gives up after {seat.timeout_seconds:g} s)",
    )


def _what_happened(message: dict[str, Any]) -> str:
    if "died" in message:
        return f"process {message['process']} ({message['died']}) ended without a word"
    return f"process {message['process']} failed: {message['failed']}"


def _some(names: Sequence[object]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _say(seat: Seat, text: str) -> None:
    print(f"process {seat.index} of {seat.count}: {text}", file=sys.stderr, flush=True)


def _keep_alive(connection: socket.socket) -> None:
    """Have idle connections looked after, lest a firewall on the way forgets them."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 10)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _end(code: int) -> NoReturn:
    """End now: jax's exit would wait for the others, who wait for this process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
