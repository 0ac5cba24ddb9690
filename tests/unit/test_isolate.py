"""The child server and its children: what they hold, what they see, and that they end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import textwrap
import threading
import time
from pathlib import Path

import pytest

from leakbench.errors import UserError
from leakbench.runner import isolate
from leakbench.runner.bubblewrap import bubblewrap_works
from leakbench.runner.children import OUTPUT_LIMIT, ChildFailed, one_line
from leakbench.runner.isolate import ChildServer, choose_level, describe_entries
from leakbench.runner.server import SPARES

NUMBERS = itertools.count()
LEVELS = [
    "process",
    pytest.param("bwrap", marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap cannot be used here")),
]


@pytest.fixture(scope="module", params=LEVELS)
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_TEST_SECRET", "4711-0815")
        with ChildServer(request.param, files=[folder]) as started:
            started.test_folder = folder
            yield started


def request_for(server: ChildServer, code: str) -> dict:
    """Write ``code`` to a file that is imported as an attack; it answers by raising."""
    path = server.test_folder / f"entry{next(NUMBERS)}.py"
    path.write_text(f"import json, os, sys, time\n{textwrap.dedent(code)}\n")
    return {"kind": "attack", "name": "entry", "module": None, "path": str(path), "class_name": None}


def inside(server: ChildServer, code: str, seconds: float = 30, **options):
    """Run ``code`` in a child and return what it assigns to ``answer``."""
    request = request_for(server, textwrap.dedent(code) + '\nraise RuntimeError("ANSWER" + json.dumps(answer) + "END")')
    with server.spawn(**options) as child:
        body = child.ask("describe", {"entries": [request]}, expect="described", seconds=seconds).body
    text = body["entries"][0]["error"]
    assert "ANSWER" in text, text
    return json.loads(text.split("ANSWER")[1].split("END")[0])


def server_process(server: ChildServer) -> int:
    """Return the process that forks the children; under bwrap it is a descendant of the one that was started."""
    server._ready.wait(60)
    pid = server._process.pid
    while b"leakbench.runner.server" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]:
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


def ends(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_the_server_has_one_thread_and_no_accelerator(server):
    status = Path(f"/proc/{server_process(server)}/status").read_text()
    assert "Threads:\t1\n" in status
    try:
        maps = Path(f"/proc/{server_process(server)}/maps").read_text()
    except PermissionError:
        pytest.skip("this user cannot look into the server, which is as it should be")
    assert "/dev/nvidia" not in maps
    assert "libcuda.so" not in maps


def test_the_server_and_its_children_know_nothing_of_our_environment(server):
    environment = inside(server, "answer = dict(os.environ)")
    assert "4711-0815" not in json.dumps(environment)
    assert set(environment) & set(os.environ) <= {
        *("HOME", "TMPDIR", "PATH", "PWD", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        *("KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR"),  # set by importing torch
    }
    code = "answer = [open(f'/proc/self/{name}').read().count('4711-0815') for name in ('environ', 'cmdline')]"
    assert inside(server, code) == [0, 0]


@pytest.mark.parametrize("busy", [0, SPARES + 1], ids=["spare", "forked-on-demand"])
def test_a_child_holds_no_descriptors_but_its_own(server, busy):
    code = """
    answer = {}
    for fd in range(1024):
        try:
            answer[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
    """
    with contextlib.ExitStack() as others:
        for _ in range(busy):
            others.enter_context(server.spawn())
        held = inside(server, code)
    kinds = sorted(target.split(":")[0] for target in held.values())
    assert kinds == ["/dev/null", "pipe", "pipe", "socket"], held


def test_a_child_is_one_thread_without_capabilities_in_a_session_of_its_own(server):
    code = """
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    answer = [int(lines[name], 16) for name in ("Threads", "CapEff", "NoNewPrivs")] + [os.getsid(0) == os.getpid()]
    """
    assert inside(server, code) == [1, 0, 1, True]


def test_jobs_share_no_folder(server):
    code = """
    import tempfile
    from pathlib import Path
    answer = [os.getcwd(), os.environ["HOME"], tempfile.gettempdir(), os.listdir(".")]
    Path("left.txt").write_text("behind")
    """
    first, second = inside(server, code), inside(server, code)
    assert first[0] == first[1] == first[2]
    assert first[0] != second[0]
    assert first[3] == second[3] == []


def test_a_jobs_folder_is_removed_with_it(server):
    if server.level == "bwrap":
        pytest.skip("its folder is not visible here")
    folder = Path(inside(server, "open('left.txt', 'w').write('behind')\nanswer = os.getcwd()"))
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not folder.exists()


def test_what_a_child_changes_in_its_process_is_gone_with_it(server):
    inside(server, "import torch\ntorch.zeros = None\nsys.modules['numpy'] = None\nanswer = 1")
    assert inside(server, "import numpy, torch\nanswer = torch.zeros(3).numpy().tolist()") == [0, 0, 0]


def test_a_child_computes_with_several_threads(server):
    code = """
    import torch
    x = torch.randn(64, 8, 32, 32, requires_grad=True)
    torch.nn.functional.conv2d(x, torch.randn(16, 8, 5, 5)).square().sum().backward()
    answer = [torch.get_num_threads(), bool((torch.randn(300, 300) @ torch.randn(300, 300)).isfinite().all())]
    """
    assert inside(server, code, threads=2) == [2, True]


def test_printed_output_is_capped_and_the_rest_dropped(server):
    request = request_for(server, "print('x' * 5_000_000, flush=True)\nos.write(2, b'y' * 100)")
    with server.spawn() as child:
        body = child.ask("describe", {"entries": [request]}, expect="described", seconds=30).body
        assert "expected one registered Attack" in body["entries"][0]["error"]
        child._drain()
        assert len(child.output) == OUTPUT_LIMIT


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("time.sleep(60)", "timeout", "took longer than 1 s"),
        ("os._exit(3)", "error", r"exited \(3\)"),
        ("print('the last words'); sys.stdout.flush(); os.abort()", "error", "died by signal 6.*the last words"),
        ("os.kill(os.getpid(), 9)", "oom", "out of memory"),
    ],
)
def test_the_end_of_a_child_is_told_as_a_status(server, code, status, says):
    request = request_for(server, code)
    begun = time.monotonic()
    with server.spawn() as child, pytest.raises(ChildFailed) as failure:
        child.ask("describe", {"entries": [request]}, expect="described", seconds=1)
    assert failure.value.status == status
    assert failure.match(says)
    assert time.monotonic() - begun < 4.5, "the end of a child was waited for instead of noticed"


def test_a_limit_of_memory_holds(server):
    code = """
    try:
        answer = len(bytearray(2 << 30))
    except MemoryError:
        answer = "MemoryError"
    """
    assert inside(server, code, memory=1 << 30) == "MemoryError"


def test_closing_a_child_ends_everything_it_started(server):
    code = """
    pids = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            if number % 2:
                os.setsid()
            time.sleep(600)
        pids.append(pid)
    answer = pids
    """
    inside(server, code)
    deadline = time.monotonic() + 10
    while len(alive := descendants(server_process(server))) > SPARES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(alive) <= SPARES


def test_children_run_at_once_and_are_told_apart(server):
    answers = {}

    def ask(number):
        answers[number] = inside(server, f"time.sleep(0.2)\nanswer = {number}")

    requests = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in requests:
        thread.start()
    for thread in requests:
        thread.join()
    assert answers == {0: 0, 1: 1, 2: 2}


def test_an_answer_that_nobody_asked_for_is_invalid(server):
    with server.spawn() as child, pytest.raises(ChildFailed) as failure:
        child.ask("describe", {"entries": []}, expect="recovery", seconds=10)
    assert failure.value.status == "invalid"
    assert failure.match("'described' where 'recovery'")


def test_bwrap_shows_no_home_no_dataset_and_no_other_process(server):
    if server.level != "bwrap":
        pytest.skip("level process hides them by Landlock")
    code = f"""
    from pathlib import Path
    import sklearn
    deadline = time.monotonic() + 10  # children that other tests used may still be ending
    while len([name for name in os.listdir("/proc") if name.isdigit()]) > 3 + {SPARES} and time.monotonic() < deadline:
        time.sleep(0.05)
    data = Path(sklearn.__file__).parent / "datasets" / "data"
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    answer = [os.path.exists(p) for p in ({os.path.expanduser("~/.profile")!r}, "/home", "/var", "/mnt", "/srv")]
    answer += [len(pids) <= 3 + {SPARES}, os.getpid() < 100, list(data.glob("*")) == []]
    answer.append(open("/proc/net/dev").read().count(":"))  # network interfaces
    """
    assert inside(server, code) == [False] * 5 + [True, True, True, 1]


def test_closing_the_server_ends_children_and_daemons(tmp_path):
    code = """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        time.sleep(600)
    time.sleep(600)
    """
    with ChildServer("process", files=[tmp_path]) as started:
        started.test_folder = tmp_path
        pid = server_process(started)
        child = started.spawn()
        isolate_send(child, request_for(started, code))
        deadline = time.monotonic() + 20
        while len(family := descendants(pid)) < 3 + SPARES and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(family) == 3 + SPARES
    assert all(ends(one) for one in (pid, *family))
    assert not started._folder.exists()


def isolate_send(child, request) -> None:
    from leakbench.runner.wire import send

    send(child.sock, "describe", {"entries": [request]})


def descendants(pid: int) -> list[int]:
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def test_describing_survives_every_file(tmp_path):
    codes = {
        "hangs": ("import time; time.sleep(60)", "took longer"),
        "exits": ("import os; os._exit(0)", "exited"),
        "broken": ("def (:", "SyntaxError"),
        "missing": ("import no_such_module", "no_such_module"),
        "empty": ("", "found 0"),
        "coding": ("# coding: no-such-coding", "Error"),
        "half": ("raise ValueError('\\ud800 \\x1b[31m')", "ValueError"),
    }
    requests = []
    for name, (code, _) in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
        path = str(tmp_path / f"{name}.py")
        requests.append({"kind": "attack", "name": name, "module": None, "path": path, "class_name": None})
    answers = describe_entries(requests, "process", seconds=2)
    for (name, (_, says)), answer in zip(codes.items(), answers, strict=True):
        assert says in answer["error"], name
        assert answer["error"].isprintable()


def test_an_unknown_or_unusable_level_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="expected auto, none, process or bwrap, got 'docker'"):
        choose_level("docker")
    monkeypatch.setattr(isolate, "bubblewrap_works", lambda: False)
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        choose_level("bwrap")
    assert choose_level("auto") == "process"


def test_one_line_leaves_nothing_that_a_terminal_or_a_table_would_choke_on():
    text = one_line("two\nlines \x1b]0;title\x07 \ud800 \0 and\ttabs " + "x" * 5000)
    assert text.isprintable()
    assert len(text) == 1000
    text.encode()
