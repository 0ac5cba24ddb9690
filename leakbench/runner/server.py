"""The child server: a process started by exec before any data is loaded, which forks one child per request.

It preloads the libraries that entries use, so a child costs a fork instead of an import. It never runs a tensor
operation and never touches CUDA (a child that is forked after an OpenMP region hangs), and it imports no entry.

Run as ``python -I -m leakbench.runner.server FD FOLDER``; FD is a SEQPACKET socket to the runner.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
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
    sock = socket.socket(fileno=fd)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle; it closes the socket
    jobs: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(sock, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    _tell(sock, {"ready": True})
    try:
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wake_read in ready:
                os.read(wake_read, 4096)
            _reap(sock, jobs, folder)
            if sock.fileno() not in ready:
                continue
            text, fds, _, _ = socket.recv_fds(sock, 65536, 2)
            if not text:
                return
            request = json.loads(text)
            if request["do"] == "kill":
                for pid in [pid for pid, job in jobs.items() if job == request["job"]]:
                    _kill(pid)
                continue
            place = folder / str(request["job"])
            place.mkdir(mode=0o700)
            pid = os.fork()
            if pid == 0:
                selector.close()
                for inherited in (sock.fileno(), wake_read, wake_write):
                    os.close(inherited)
                _become_child(request, place, *fds)
            jobs[pid] = request["job"]
            for sent in fds:
                os.close(sent)
    finally:
        for pid in jobs:
            _kill(pid)
        shutil.rmtree(folder, ignore_errors=True)  # also where the runner was killed and cannot
        _end_descendants()


def _become_child(request: dict[str, Any], place: Path, channel: int, output: int) -> NoReturn:
    """Confine the forked process and serve one job; entries are imported only after this."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server = os.getppid()
        os.setsid()
        harden.die_with_parent()
        if os.getppid() != server:
            os._exit(1)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(place)
        os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = str(place)
        harden.limit(memory=request["memory"], file_size=request["file_size"])
        landlock = harden.landlock(request["readable"], [place, *DEVICES, *request["devices"]])
        detail = {"landlock": landlock, "capabilities_dropped": harden.drop_capabilities()}
        from leakbench.runner import child

        child.serve(socket.socket(fileno=channel), threads=request["threads"], detail=detail)
        status = 0
    except BaseException as error:  # nothing may run the server's code in a child
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(sock: socket.socket, jobs: dict[int, int], folder: Path) -> None:
    """Collect ended children, tell the runner, and end whatever a job left behind."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid in jobs:
            job = jobs.pop(pid)
            _kill_group(pid)
            shutil.rmtree(folder / str(job), ignore_errors=True)
            _tell(sock, {"exited": job, "status": os.waitstatus_to_exitcode(status), "rss": usage.ru_maxrss * 1024})
    # A daemonised grandchild ends up here: children of the server that are nobody's job.
    for orphan in _children() - set(jobs):
        _kill(orphan)


def _end_descendants(seconds: float = 2.0) -> None:
    """End what jobs left behind, generation by generation: the death of one hands its children to this process."""
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


def _tell(sock: socket.socket, message: dict[str, Any]) -> None:
    try:
        sock.send(json.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        raise SystemExit(0) from None


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # tearing down three thousand modules takes seconds, and nobody waits for anything in them
