"""What each measure of confinement closes, tried in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from leakbench.runner import harden

needs_landlock = pytest.mark.skipif(harden.landlock_abi() == 0, reason="the kernel has no Landlock")


def run(code: str, **options) -> str:
    """Run ``code`` in a process of its own and return what it prints."""
    code = "import os, socket, sys\nfrom leakbench.runner import harden\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def start(code: str, **options) -> subprocess.Popen:
    """Start ``code`` and wait until it prints its first line."""
    code = "import os, sys, time\nfrom leakbench.runner import harden\n" + textwrap.dedent(code)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline()
    return process


TRY = """
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "yes"
    except OSError as error:
        return type(error).__name__
"""


@needs_landlock
def test_landlock_leaves_only_the_named_folders(tmp_path):
    for name in ("open", "desk", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    code = f"""
    harden.landlock({[str(tmp_path / "open"), "/does/not/exist"]}, {[str(tmp_path / "desk"), "/dev/null"]})
    print(attempt(open, "{tmp_path}/open/file"), attempt(open, "{tmp_path}/open/file", "a"),
          attempt(open, "{tmp_path}/desk/new", "w"), attempt(open, "{tmp_path}/secret/file"),
          attempt(os.listdir, "{tmp_path}"), attempt(os.listdir, "{tmp_path}/secret"),
          attempt(os.truncate, "{tmp_path}/open/file", 0), attempt(open, "/dev/null", "w"),
          attempt(os.rename, "{tmp_path}/desk/new", "{tmp_path}/secret/new"))
    """
    said = run(TRY + textwrap.dedent(code)).split()
    denied = "PermissionError"
    assert said[:8] == ["yes", denied, "yes", denied, denied, denied, denied, "yes"]
    assert said[8] in (denied, "OSError")
    assert (tmp_path / "open" / "file").read_text() == "open"


@pytest.mark.skipif(harden.landlock_abi() < 4, reason="needs Landlock 4")
def test_landlock_leaves_no_tcp():
    code = """
    listener = socket.create_server(("127.0.0.1", 0))
    print(attempt(socket.create_connection, listener.getsockname()))
    harden.landlock([], [])
    print(attempt(socket.create_connection, listener.getsockname()), attempt(socket.create_server, ("127.0.0.1", 0)))
    """
    assert run(TRY + textwrap.dedent(code)).split() == ["yes", "PermissionError", "PermissionError"]


@pytest.mark.skipif(harden.landlock_abi() < 6, reason="needs Landlock 6")
def test_landlock_leaves_no_signals_to_outside():
    code = """
    print(attempt(os.kill, os.getppid(), 0))
    harden.landlock([], [])
    print(attempt(os.kill, os.getppid(), 0), attempt(os.kill, os.getpid(), 0))
    """
    assert run(TRY + textwrap.dedent(code)).split() == ["yes", "PermissionError", "yes"]


def test_dropped_capabilities_do_not_come_back():
    code = """
    print(harden.drop_capabilities())
    print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs"))])
    """
    worked, sets = run(code).splitlines()
    assert worked == "True"
    *capabilities, no_new_privileges = sets.split()
    assert {int(value, 16) for value in capabilities} == {0}
    assert no_new_privileges == "1"


@pytest.mark.parametrize("dumpable", [True, False])
def test_an_undumpable_process_hides_its_memory_and_environment(dumpable):
    code = "" if dumpable else "harden.make_undumpable()\n"
    code += "harden.drop_capabilities()\nprint(1, flush=True)\ntime.sleep(60)"
    with start(code, env={**os.environ, "SECRET": "4711"}) as keeper:
        look = f"""
        harden.drop_capabilities()
        print(attempt(open, "/proc/{keeper.pid}/environ"), attempt(open, "/proc/{keeper.pid}/mem"),
              attempt(os.readlink, "/proc/{keeper.pid}/fd/1"))
        """
        said = run(TRY + textwrap.dedent(look)).split()
        keeper.kill()
    if dumpable and said[0] != "yes":
        pytest.skip("this system hides processes of the same user anyhow")
    assert said == (["yes"] * 3 if dumpable else ["PermissionError"] * 3)


def test_limits_hold_and_cannot_be_raised(tmp_path):
    code = """
    import resource
    harden.limit(memory=400 << 20, file_size=1000, processes=16)
    try:
        bytearray(500 << 20)
    except MemoryError:
        print("MemoryError")
    memory = os.memfd_create("x")
    print(attempt(os.ftruncate, memory, 1000), attempt(os.ftruncate, memory, 1001))
    print(attempt(lambda: [os.dup(0) for _ in range(100)]))
    print(resource.getrlimit(resource.RLIMIT_CORE))
    """
    said = run(TRY + textwrap.dedent(code), cwd=tmp_path).splitlines()
    assert said == ["MemoryError", "yes OSError", "OSError", "(0, 0)"]


def test_a_child_dies_with_its_parent():
    code = """
    reader, writer = os.pipe()
    if os.fork() == 0:
        harden.die_with_parent()
        os.write(writer, b"x")
        time.sleep(60)
    os.read(reader, 1)
    print(1, flush=True)
    time.sleep(60)
    """
    with start(code) as parent:
        with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as file:
            child = int(file.read())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
