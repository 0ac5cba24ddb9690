"""Confinement of a process by the kernel: capabilities, Landlock, limits. Linux; every call degrades with a word.

Called in children after the fork and before any entry is imported. What each measure closes is in tests/exploits.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_CHILD_SUBREAPER = 36

_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

# Bits of linux/landlock.h, by the ABI that introduced them.
_READ = 0b1101  # execute, read a file, read a directory
_WRITE_FILE, _TRUNCATE, _IOCTL_DEV = 1 << 1, 1 << 14, 1 << 15
_FILE_ONLY = 0b111 | _TRUNCATE | _IOCTL_DEV
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_ALL = 0b11  # bind and connect TCP; ABI 4
_SCOPE_ALL = 0b11  # abstract unix sockets and signals to outside; ABI 6


def make_undumpable() -> None:
    """Forbid other processes of the same user to read this one's memory, environment and descriptors."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Get SIGKILL when the parent process ends, however it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant that outlives its own parent."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def drop_capabilities() -> bool:
    """Give up every capability for good. Root without capabilities can trace and read nobody else's process.

    Returns:
        Whether it worked (it cannot fail for a process that has none).
    """
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    number = _SYS_CAPSET.get(os.uname().machine)
    if number is None:
        return os.geteuid() != 0
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    return int(_libc.syscall(number, header, b"\0" * 24)) == 0


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 where there is none."""
    return max(0, int(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)))


def landlock(readable: Iterable[Path | str], writable: Iterable[Path | str]) -> int:
    """Confine this process: read below ``readable``, write below ``writable``, nothing else.

    Also no TCP (ABI 4), and no signals or abstract sockets to processes outside (ABI 6). Needs no privilege.

    Args:
        readable: Files and folders that may be read and executed; those that do not exist are passed over.
        writable: Folders in which everything is allowed, and device files that may be written.

    Returns:
        The ABI that is now in force, 0 where the kernel has no Landlock.
    """
    abi = landlock_abi()
    if abi == 0:
        return 0
    everything = _ALL_BY_ABI[min(abi, 5)]
    attributes = struct.pack("<QQQ", everything, _NET_ALL if abi >= 4 else 0, _SCOPE_ALL if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = int(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0))
    if ruleset < 0:
        return 0
    try:
        for path in readable:
            _allow(ruleset, path, _READ)
        for path in writable:
            _allow(ruleset, path, everything)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return abi if int(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path | str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _FILE_ONLY
        rule = struct.pack("<Qi", rights & _ALL_BY_ABI[min(landlock_abi(), 5)], fd)
        _libc.syscall(_SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def limit(*, memory: int | None, file_size: int | None, processes: int = 64) -> None:
    """Set hard limits of this process.

    Args:
        memory: Bytes of private writable memory; mapped files and shared memory are not counted.
        file_size: Bytes of any one file it writes, memory files included.
        processes: Open descriptors are limited to 4 times this, and core dumps are off.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = min(4 * processes, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
