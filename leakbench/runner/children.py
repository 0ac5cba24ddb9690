"""One forked child, as the runner sees it: requests, answers, what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from leakbench.errors import LeakbenchError
from leakbench.runner.wire import Blob, ConnectionClosed, Message, receive, send

if TYPE_CHECKING:
    from leakbench.runner.isolate import ChildServer

OUTPUT_LIMIT = 16 * 1024
"""Bytes of a child's printed output that are kept; the rest is read and dropped."""


SEND_SECONDS = 30.0
"""Time after which a child that takes no requests has failed; a message fits the socket's buffer."""
TEXT_LIMIT = 1000
"""Most characters of an error that is shown or stored."""


def one_line(text: object) -> str:
    """Return what an entry said as one short printable line: no half characters, escape codes or line breaks."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:TEXT_LIMIT]


class ChildFailed(LeakbenchError):
    """A child did not give an answer.

    Args:
        status: ``error``, ``timeout``, ``oom`` or ``invalid``.
        text: One line.
        output: What the child printed.
    """

    def __init__(self, status: str, text: str, output: str = "") -> None:
        super().__init__(one_line(text))
        self.status = status
        self.output = output


@dataclass
class Exit:
    """How a child ended.

    Args:
        status: Exit code, or minus the signal.
        rss: Peak resident memory, bytes.
    """

    status: int
    rss: int


@dataclass
class Child:
    """One forked child, spoken to by requests and answers.

    Args:
        server: Where it was forked.
        job: Its number there.
        sock: Our end of the connection.
        pipe: Our end of its stdout and stderr, None at level ``none``.
    """

    server: ChildServer
    job: int
    sock: socket.socket
    pipe: int | None
    output: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None
    _printed: int = 0
    _greeted: bool = False
    _end: Exit | None = None

    def ask(
        self,
        kind: str,
        body: Mapping[str, Any],
        blobs: Mapping[str, Blob] | None = None,
        *,
        expect: str,
        seconds: float,
        limit: int = 1 << 20,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Message:
        """Send a request and wait for its answer; see `post` and `wait`."""
        self.post(kind, body, blobs)
        return self.wait(expect=expect, seconds=seconds, limit=limit, on_progress=on_progress)

    def post(self, kind: str, body: Mapping[str, Any], blobs: Mapping[str, Blob] | None = None) -> None:
        """Send a request.

        Args:
            kind: Kind of the request.
            body: Its JSON.
            blobs: Its tensors.

        Raises:
            ChildFailed: It died, or takes no requests.
        """
        self.sock.settimeout(SEND_SECONDS)
        try:
            send(self.sock, kind, body, blobs)
        except ConnectionClosed:
            raise self._died() from None
        except TimeoutError:
            raise ChildFailed("timeout", f"took no request for {SEND_SECONDS:.0f} s", self.output) from None

    def wait(
        self,
        *,
        expect: str,
        seconds: float,
        limit: int = 1 << 20,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Message:
        """Wait for the answer to a request.

        Args:
            expect: Kind of the answer.
            seconds: Time it may take.
            limit: Most bytes of each blob of the answer.
            on_progress: Receives the child's progress reports.

        Raises:
            ChildFailed: It died, took too long, reported an error or answered nonsense.
        """
        deadline = time.monotonic() + seconds
        try:
            while True:
                message = self._receive(deadline, limit, seconds)
                if message.kind == expect:
                    return message
                if message.kind == "hello" and not self._greeted:
                    # Sent before any entry was imported; a later one would be the entry's.
                    self.detail, self._greeted = message.body, True
                elif message.kind == "progress":
                    if on_progress is not None:
                        on_progress(message.body)
                elif message.kind == "error":
                    status = str(message.body.get("status"))
                    known = status if status in ("error", "oom", "invalid") else "error"
                    raise ChildFailed(known, str(message.body.get("error")), self.printed(message.body))
                elif message.kind != "ready":
                    raise ChildFailed("invalid", f"answered {message.kind[:40]!r} where {expect!r} was expected")
        except ConnectionClosed:
            raise self._died() from None
        except ChildFailed:
            raise
        except LeakbenchError as error:
            raise ChildFailed("invalid", str(error), self.output) from None

    def _receive(self, deadline: float, limit: int, seconds: float) -> Message:
        """Wait for one message while draining what the child prints, so that a full pipe cannot stall it."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChildFailed("timeout", f"took longer than {seconds:.0f} s", self.output)
            watched = [self.sock.fileno()] + ([self.pipe] if self.pipe is not None else [])
            ready, _, _ = select.select(watched, [], [], min(left, 1.0))
            if self.pipe in ready:
                self._drain()
            if self.sock.fileno() in ready:
                return receive(self.sock, limit=limit)

    def _drain(self) -> None:
        if self.pipe is None:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                chunk = os.read(self.pipe, 65536)
                if not chunk:
                    os.close(self.pipe)
                    self.pipe = None
                    return
                room = max(0, OUTPUT_LIMIT - self._printed)
                self.output += chunk[:room].decode(errors="replace")
                self._printed += len(chunk)

    def printed(self, body: Mapping[str, Any] | None = None) -> str:
        """Return what the child printed and, after an error, its traceback; untrusted text."""
        self._drain()
        return self.output + str((body or {}).get("traceback", ""))

    def _died(self) -> ChildFailed:
        self._drain()
        self._end = end = self.server.exit_of(self.job)
        self.peak_memory = end.rss if end else None
        last = self.output.strip().splitlines()
        said = f"; it last said: {last[-1][:300]}" if last else ""
        if not self.server.alive:
            return ChildFailed("error", f"the child server ended: {self.server.complaint()}", self.output)
        if end is not None and end.status == -9:
            # Nobody here sent this signal: timeouts are reported before the child is killed.
            return ChildFailed("oom", f"was killed by the system, most likely out of memory{said}", self.output)
        how = "died" if end is None else f"died by signal {-end.status}" if end.status < 0 else f"exited ({end.status})"
        return ChildFailed("error", f"{how} without an answer{said}", self.output)

    def close(self, *, wait: bool = True) -> Exit | None:
        """End the child and return how it ended; a second call does nothing.

        Args:
            wait: Whether to wait until the server says how it ended.
        """
        if self.sock.fileno() < 0:
            return None
        self.server.kill(self.job)
        self.sock.close()
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None
        if not wait:
            self.server.forget(self.job)
            return None
        self._end = self._end or self.server.exit_of(self.job)
        if self._end is not None and self._end.rss:
            self.peak_memory = self._end.rss
        return self._end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
