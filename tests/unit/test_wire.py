"""What crosses the boundary arrives as it was sent; what was not sent by the rules does not arrive."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakbench.errors import InvalidOutput, LeakbenchError
from leakbench.runner import wire
from leakbench.runner.wire import Blob, ConnectionClosed, receive, send

LIMIT = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def tensor_dicts(draw):
    specs = draw(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=5))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return {
        name: torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=seeded).to(dtype)
        for name, (dtype, shape) in specs.items()
    }


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.settimeout(2)
        yield ours, theirs


def sealed(content: bytes, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def content_of(blob: Blob) -> bytes:
    return os.pread(blob.fd, blob.size, 0)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@given(tensor_dicts())
def test_tensors_arrive_as_they_were_sent(tensors):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send(ours, "update", {"round": 1}, {"update": Blob.pack(tensors)})
        message = receive(theirs, limit=LIMIT)
    assert (message.kind, message.body) == ("update", {"round": 1})
    arrived = message.tensors("update")
    assert arrived.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)


@given(tensor_dicts())
def test_packed_bytes_are_what_safetensors_reads(tensors):
    blob = Blob.pack(tensors)
    read = safetensors.torch.load(content_of(blob))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_views_and_differentiable_tensors_are_packed_by_value():
    base = torch.arange(12.0, requires_grad=True).view(3, 4)
    sent = {"transposed": base.T, "expanded": base[:1].expand(5, 4), "strided": base[::2, 1::2]}
    read = Blob.pack(sent).load()
    assert all(torch.equal(read[name], tensor) for name, tensor in sent.items())


def test_changing_a_loaded_tensor_changes_nobody_elses():
    blob = Blob.pack({"x": torch.zeros(1000)})
    first, second = blob.load()["x"], blob.load()["x"]
    first += 1
    assert second.sum() == 0
    assert blob.load()["x"].sum() == 0


def test_tensors_outlive_their_descriptor():
    blob = Blob.pack({"x": torch.ones(5)})
    tensors = blob.load()
    blob.close()
    assert tensors["x"].sum() == 5


def test_a_packed_file_can_no_longer_be_changed():
    blob = Blob.pack({"x": torch.zeros(4)})
    with pytest.raises(PermissionError):
        os.pwrite(blob.fd, b"x", 0)
    for size in (0, blob.size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(blob.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(
            blob.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_FUTURE_WRITE if hasattr(fcntl, "F_SEAL_FUTURE_WRITE") else 16
        )


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, SEALS])
def test_every_seal_is_demanded(missing):
    fd = sealed(content_of(Blob.pack({"x": torch.zeros(4)})), SEALS & ~missing)
    with pytest.raises(InvalidOutput, match="sealed memory file"):
        Blob.adopt(fd, limit=LIMIT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_only_memory_files_are_taken(tmp_path):
    plain = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    reader, writer = os.pipe()
    for fd in (plain, reader, writer, os.open("/dev/zero", os.O_RDONLY)):
        with pytest.raises(InvalidOutput, match="sealed memory file"):
            Blob.adopt(fd, limit=LIMIT)


def test_more_bytes_than_expected_are_not_mapped():
    fd = sealed(b"x" * 101)
    with pytest.raises(InvalidOutput, match="101 bytes where at most 100"):
        Blob.adopt(fd, limit=100)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_tensors(content):
    with pytest.raises(InvalidOutput):
        Blob.adopt(sealed(content), limit=LIMIT).load()


@settings(max_examples=200)
@given(st.data())
def test_damaged_safetensors_are_refused_or_still_well_formed(data):
    whole = content_of(Blob.pack({"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, dtype=torch.int64)}))
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [whole[:position], whole + whole[:position], whole[:position] + b"\xff" + whole[position + 1 :]]
        )
    )
    try:
        tensors = Blob.adopt(sealed(damaged), limit=LIMIT).load()
    except InvalidOutput:
        return
    assert sum(tensor.numel() for tensor in tensors.values()) <= len(damaged)


def _file(header: dict, data: bytes) -> int:
    text = json.dumps(header).encode()
    return sealed(struct.pack("<Q", len(text)) + text + data)


X = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"__metadata__": {"labels": "3, 5"}, "x": X}, "metadata"),
        ({"x": {**X, "dtype": "F8_E4M3", "shape": [4]}}, "nothing here computes with"),
        ({"x": {**X, "dtype": "C64", "data_offsets": [0, 8]}}, "sent tensors"),
        ({"x": {**X, "shape": [2]}}, "cannot be read"),
        ({"x": {**X, "data_offsets": [0, 1 << 40]}}, "cannot be read"),
        ({"x": X, "y": X}, "cannot be read"),
        ({"x": X, "y": {**X, "data_offsets": [8, 12]}}, "cannot be read"),
        ({"x" * 5_000_000: X}, "proper safetensors header"),
    ],
)
def test_headers_that_smuggle_or_lie_are_refused(header, why):
    with pytest.raises(InvalidOutput, match=why):
        Blob.adopt(_file(header, b"\0" * 4), limit=1 << 30).load()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(min_size=1, max_size=300), st.from_type(int).map(str).map(str.encode)))
def test_arbitrary_datagrams_are_no_messages(pair, content):
    pair[0].send(content)
    with pytest.raises(InvalidOutput, match="malformed"):
        receive(pair[1], limit=LIMIT)


@pytest.mark.parametrize(
    "message",
    [
        [],
        None,
        {"kind": "x", "body": {}},
        {"kind": 1, "body": {}, "blobs": []},
        {"kind": "x", "body": [], "blobs": []},
        {"kind": "x", "body": {}, "blobs": ["a"]},
        {"kind": "x", "body": {}, "blobs": 3},
        {"kind": "x", "body": {}, "blobs": None},
    ],
)
def test_messages_of_another_form_are_refused(pair, message):
    pair[0].send(json.dumps(message).encode())
    with pytest.raises(InvalidOutput, match="malformed"):
        receive(pair[1], limit=LIMIT)


def test_deeply_nested_messages_are_refused(pair):
    pair[0].send(b"[" * 100_000)
    with pytest.raises(InvalidOutput, match="malformed"):
        receive(pair[1], limit=LIMIT)


def test_messages_over_the_limit_are_neither_sent_nor_taken(pair):
    with pytest.raises(LeakbenchError, match="too large"):
        send(pair[0], "x", {"text": "y" * wire.MESSAGE_LIMIT})
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    pair[0].send(json.dumps({"kind": "x", "body": {"text": "y" * wire.MESSAGE_LIMIT}, "blobs": []}).encode())
    with pytest.raises(InvalidOutput):
        receive(pair[1], limit=LIMIT)


def test_no_refused_message_leaves_a_descriptor_behind(pair):
    good = json.dumps({"kind": "x", "body": {}, "blobs": ["a", "b"]}).encode()
    before = descriptors()
    for text, count in ((b"garbage", 2), (good, 1), (good, 2), (good, 8), (good, 20)):
        fds = [sealed(b"x", seals=0) for _ in range(count)]
        socket.send_fds(pair[0], [text], fds)
        for fd in fds:
            os.close(fd)
        with pytest.raises(InvalidOutput):
            receive(pair[1], limit=LIMIT)
    assert descriptors() == before


def test_too_many_blobs_are_not_sent(pair):
    blob = Blob.pack({})
    with pytest.raises(LeakbenchError, match="too large"):
        send(pair[0], "x", {}, {str(i): blob for i in range(wire.FDS_LIMIT + 1)})


def test_the_end_of_the_other_side_is_told(pair):
    pair[0].close()
    with pytest.raises(ConnectionClosed):
        receive(pair[1], limit=LIMIT)
    with pytest.raises(ConnectionClosed):
        send(pair[1], "x", {})


def test_an_absent_blob_holds_no_tensors(pair):
    send(pair[0], "x", {})
    assert receive(pair[1], limit=LIMIT).tensors("update") == {}
