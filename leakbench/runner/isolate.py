"""The runner's side of the boundary: starting the child server, talking to children, ending them in time.

Levels: ``none`` runs entries in this process (debugging; not publishable); ``process`` forks them from a server that
never held data, without capabilities and confined by Landlock; ``bwrap`` puts that server into a minimal root without
network, datasets, results or home.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from leakbench.errors import UserError
from leakbench.runner import harden
from leakbench.runner.bubblewrap import JOBS, bubblewrap_command, bubblewrap_works
from leakbench.runner.children import Child, ChildFailed, Exit, one_line

Level = Literal["none", "process", "bwrap"]

START_SECONDS = 120.0

# Reused heap instead of fresh pages: a page fault costs 14x a copy (research/engine.md, B).
_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}


def choose_level(requested: str) -> Level:
    """Return the isolation level for ``auto``, ``none``, ``process`` or ``bwrap``.

    Raises:
        UserError: bubblewrap was asked for and cannot be used.
    """
    if requested == "auto":
        return "bwrap" if bubblewrap_works() else "process"
    if requested == "bwrap" and not bubblewrap_works():
        raise UserError(
            "--isolation bwrap: bubblewrap is not installed or may not create namespaces here; "
            "install it (Debian: apt-get install bubblewrap) or type --isolation process"
        )
    if requested not in ("none", "process", "bwrap"):
        raise UserError(f"--isolation: expected auto, none, process or bwrap, got {requested!r}")
    return requested  # type: ignore[return-value]


@cache
def readable_paths() -> tuple[str, ...]:
    """Folders a child may read: the interpreter, the installed packages and system libraries; no data, no results."""
    from importlib.util import find_spec

    paths = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/proc", "/sys"}
    paths |= {"/etc/localtime", "/etc/passwd"}
    for package in ("leakbench", "leakbench_baselines"):
        spec = find_spec(package)
        if spec is not None:
            paths |= set(spec.submodule_search_locations or ())
    return tuple(sorted(path for path in paths if os.path.exists(path)))


class ChildServer:
    """A running child server.

    Args:
        level: Isolation level.
        files: Entry files and package folders that children may read besides the installed packages.
        device: ``cpu`` or a CUDA device; its device nodes are made visible.
    """

    def __init__(self, level: Level, *, files: Iterable[Path] = (), device: str = "cpu") -> None:
        self.level = level
        self._files = [str(path) for path in files]
        self._devices = _device_nodes() if device != "cpu" else []
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._exits: dict[int, Exit | None] = {}
        self._changed = threading.Condition()
        self._next = 0
        self._process: subprocess.Popen[bytes] | None = None
        if level != "none":
            # The children's answers are only worth something if they cannot read this process.
            harden.make_undumpable()
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **_ALLOCATOR,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # scikit-learn imports Arrow; who forks has one thread
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
        }
        if self._devices and "CUDA_VISIBLE_DEVICES" in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        if self.level == "process":
            self._folder = Path(tempfile.mkdtemp(prefix="leakbench-"))
        inside = JOBS if self._folder is None else str(self._folder)
        command = [sys.executable, "-I", "-m", "leakbench.runner.server", str(theirs.fileno()), inside]
        if self.level == "bwrap":
            command = bubblewrap_command([*readable_paths(), *self._files], self._devices) + command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)
        self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env=environment,
            pass_fds=(theirs.fileno(),),
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self._sock = ours
        self._ready = threading.Event()
        threading.Thread(target=self._listen, name="child-server", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                text = self._sock.recv(65536)
            except OSError:
                text = b""
            with self._changed:
                if not text:
                    self._ready.set()
                    for job, known in self._exits.items():
                        if known is None:
                            self._exits[job] = Exit(-9, 0)
                    self._exits[-1] = Exit(-9, 0)
                    self._changed.notify_all()
                    return
                message = json.loads(text)
                if "ready" in message:
                    self._ready.set()
                elif message["exited"] in self._exits:
                    self._exits[message["exited"]] = Exit(message["status"], message["rss"])
                self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self.level == "none" or -1 not in self._exits

    def spawn(
        self,
        *,
        memory: int | None = None,
        file_size: int | None = None,
        threads: int = 1,
        local: Mapping[str, Any] | None = None,
    ) -> Child:
        """Fork a child.

        Args:
            memory: Bytes of private memory it may use.
            file_size: Bytes of any file it may write, what it sends included.
            threads: Threads of its tensor operations.
            local: Instances by token (isolation ``none`` only).

        Raises:
            ChildFailed: The server is gone.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self.level == "none":
            from leakbench.runner import child

            arguments = {"threads": threads, "detail": {}, "local": local}
            threading.Thread(target=child.serve, args=(theirs,), kwargs=arguments, daemon=True).start()
            return Child(self, -2, ours, None)
        self._ready.wait(START_SECONDS)
        with self._lock:
            job, self._next = self._next, self._next + 1
        with self._changed:
            if -1 in self._exits:
                raise ChildFailed("error", f"the child server ended: {self.complaint()}")
            self._exits[job] = None
        output, printed = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(printed, True)
        request = {
            "do": "fork",
            "job": job,
            "memory": memory,
            "file_size": file_size,
            "threads": threads,
            "readable": [*readable_paths(), *self._files],
            "devices": self._devices,
        }
        try:
            with self._lock:
                socket.send_fds(self._sock, [json.dumps(request).encode()], [theirs.fileno(), printed])
        except OSError:
            os.close(output)
            ours.close()
            raise ChildFailed("error", f"the child server ended: {self.complaint()}") from None
        finally:
            theirs.close()
            os.close(printed)
        return Child(self, job, ours, output)

    def kill(self, job: int) -> None:
        """End a child and everything it started."""
        if self.level != "none":
            with self._lock, contextlib.suppress(OSError):
                self._sock.send(json.dumps({"do": "kill", "job": job}).encode())

    def exit_of(self, job: int, timeout: float = 5.0) -> Exit | None:
        """Wait for a child's end; None when it did not end in time."""
        if self.level == "none":
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._exits.get(job) is not None, timeout)
            return self._exits.pop(job, None)

    def forget(self, job: int) -> None:
        """Do not keep how a child ends."""
        with self._changed:
            self._exits.pop(job, None)

    def close(self) -> None:
        """End the server and all its children."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._sock.close()
            self._errors.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def complaint(self) -> str:
        """Return the last line that the server itself printed."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def describe_entries(
    requests: Sequence[Mapping[str, Any]], isolation: str = "auto", *, seconds: float = 60.0
) -> list[dict[str, Any]]:
    """Import entries in a child each and return ``{"ok": fields}`` or ``{"error": line}`` for each request.

    Args:
        requests: ``kind``, ``name``, ``module`` or ``path``, ``class_name``.
        isolation: Isolation level; ``none`` is raised to ``process``, an import is never done here.
        seconds: Time each import may take.
    """
    level = choose_level("process" if isolation == "none" else isolation)
    answers: list[dict[str, Any]] = []
    with ChildServer(level, files=[Path(r["path"]) for r in requests]) as server:
        for request in requests:
            with server.spawn(memory=4 << 30, file_size=1 << 20) as child:
                try:
                    body = {"entries": [dict(request)]}
                    told = child.ask("describe", body, expect="described", seconds=seconds).body.get("entries")
                    answer = told[0] if isinstance(told, list) and len(told) == 1 else None
                    if not isinstance(answer, dict):
                        answer = {"error": "answered nonsense when asked to describe itself"}
                    answers.append({"error": one_line(answer["error"])} if "error" in answer else answer)
                except ChildFailed as error:
                    answers.append({"error": f"{error}"})
    return answers


def _device_nodes() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("nvidia*"))
