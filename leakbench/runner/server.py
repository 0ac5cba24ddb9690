"""The child server: a process started by exec before any data is loaded, which forks one child per request.

It preloads the libraries that entries use, so a child costs a fork instead of an import. It never runs a tensor
operation and never touches CUDA (a child that is forked after an OpenMP region hangs), and it imports no entry.

Run as ``python -I -m leakbench.runner.server FD FOLDER``; FD is a SEQPACKET socket to the runner.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from leakbench.runner import harden

PRELOAD = (
    "torch",
    "torch.func",
    "torch._dynamo",  # torch.optim loads it on first use, 1.6 s
    "torch.nested._internal.nested_tensor",
    "numpy.ctypeslib",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
    "sklearn",
    "sympy",  # shape arithmetic of tensors without storage; 0.5 s in every child otherwise
    "safetensors.torch",
    "leakbench.runner.child",
)
"""Modules imported once in the server. A private one that a release drops is passed over."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


SPARES = 2
"""Children forked ahead of need: copying the page tables of a process with torch takes some 20 ms."""
IDLE_MS = 50
"""While jobs run, spare children are forked only after this long without a request; between jobs at once."""


def main(fd: int, folder: Path) -> None:
    """Serve until the runner closes its end of the socket."""
    harden.make_undumpable()
    harden.adopt_orphans()
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError:
            if name.startswith("leakbench"):
                raise
    # A collection in a child would touch every object here, and so copy 200 MB page by page.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes the socket
    Server(socket.socket(fileno=fd), folder).serve()


class Server:
    """Forks children, ends them, and tells the runner how they ended.

    Args:
        sock: Connection to the runner.
        folder: Where jobs get a folder each.
    """

    def __init__(self, sock: socket.socket, folder: Path) -> None:
        self._sock = sock
        self._folder = folder
        self._jobs: dict[int, int] = {}
        self._told: set[int] = set()
        self._spares: dict[int, socket.socket] = {}
        self._wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._own = (sock.fileno(), self._wake, woken)

    def serve(self) -> None:
        """Do what the runner asks for until it closes the connection; fork spare children while it asks nothing."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        self._tell({"ready": True})
        try:
            while True:
                patience = IDLE_MS if len(self._told) < len(self._jobs) else 0
                ready = {fd for fd, _ in poll.poll(None if len(self._spares) == SPARES else patience)}
                if not ready:
                    self._fork()
                if self._wake in ready:
                    os.read(self._wake, 4096)
                    self._reap()
                if self._sock.fileno() in ready:
                    text, fds, _, _ = socket.recv_fds(self._sock, 65536, 2)
                    if not text:
                        return
                    request = json.loads(text)
                    if request["do"] == "kill":
                        self._end(request["job"])
                    else:
                        self._start(request["job"], text, fds)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # also where the runner was killed and cannot
            _end_descendants()

    def _fork(self, received: Sequence[int] = ()) -> None:
        """Fork a child that waits for a job and holds none of ``received``, which come to it by its channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            for fd in (*self._own, *received, ours.fileno(), *(spare.fileno() for spare in self._spares.values())):
                os.close(fd)
            _wait_for_job(theirs, self._folder, server)
        theirs.close()
        self._spares[pid] = ours

    def _start(self, job: int, text: bytes, fds: list[int]) -> None:
        """Hand a job to a spare child."""
        (self._folder / str(job)).mkdir(mode=0o700)
        if not self._spares:
            self._fork(fds)
        pid, channel = self._spares.popitem()
        self._jobs[pid] = job
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end will be noticed and told
            socket.send_fds(channel, [text], fds)
        channel.close()
        for sent in fds:
            os.close(sent)

    def _end(self, job: int) -> None:
        """Kill a job's child; the runner need not wait for the kernel to take it apart."""
        for pid in [pid for pid, known in self._jobs.items() if known == job and job not in self._told]:
            peak = _peak_memory(pid)
            _kill(pid)
            self._told.add(job)
            self._tell({"exited": job, "status": -signal.SIGKILL, "rss": peak})

    def _reap(self) -> None:
        """Collect ended children, tell the runner, and end whatever a job left behind."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in self._spares:
                self._spares.pop(pid).close()
            elif pid in self._jobs:
                job = self._jobs.pop(pid)
                _kill_group(pid)
                shutil.rmtree(self._folder / str(job), ignore_errors=True)
                if job not in self._told:
                    code = os.waitstatus_to_exitcode(status)
                    self._tell({"exited": job, "status": code, "rss": usage.ru_maxrss * 1024})
                self._told.discard(job)
        # A daemonised grandchild ends up here: children of the server that are nobody's job.
        for orphan in _children() - set(self._jobs) - set(self._spares):
            _kill(orphan)

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._sock.send(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            raise SystemExit(0) from None


def _wait_for_job(channel: socket.socket, folder: Path, server: int) -> NoReturn:
    """Confine the forked process as its job asks and serve it; entries are imported only after this."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        harden.die_with_parent()
        text, fds, _, _ = socket.recv_fds(channel, 65536, 2)
        if os.getppid() != server or not text:
            os._exit(1)
        channel.close()
        request = json.loads(text)
        place = folder / str(request["job"])
        answers, output = fds
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(place)
        os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = str(place)
        harden.limit(memory=request["memory"], file_size=request["file_size"])
        landlock = harden.landlock(request["readable"], [place, *DEVICES, *request["devices"]])
        detail = {"landlock": landlock, "capabilities_dropped": harden.drop_capabilities()}
        from leakbench.runner import child

        child.serve(socket.socket(fileno=answers), threads=request["threads"], detail=detail)
        status = 0
    except BaseException as error:  # nothing may run the server's code in a child
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _peak_memory(pid: int) -> int:
    """Return the peak resident bytes of a running process, 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def _end_descendants(seconds: float = 2.0) -> None:
    """End all children, generation by generation: the death of one hands its own to this process."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            for pid in _children():
                _kill(pid)
            os.wait4(-1, 0)


def _children() -> set[int]:
    try:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    except OSError:
        return set()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _kill(pid: int) -> None:
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # tearing down three thousand modules takes seconds, and nobody waits for anything in them
