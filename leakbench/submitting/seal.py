"""Seals: a list of checksums over a folder of results, and who signed it.

``SHA256SUMS`` has the format of the tool ``sha256sum`` (``sha256sum -c SHA256SUMS`` checks it without leakbench). It
proves that the files are those that were sealed, and nothing of where they come from: whoever can change a file can
seal again. Who sealed is proved by a signature beside it (``SHA256SUMS.sig``, made with ``ssh-keygen -Y sign -n
leakbench``) whose key is in a list of signers. None of these says that a number is right: that takes a second run
(`leakbench reproduce ROW_ID`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from leakbench.errors import UserError

SEAL = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
NAMESPACE = "leakbench"
"""What a signature is made for; one made for another purpose does not count."""


def sealed_files(folder: Path) -> list[str]:
    """Return the paths, relative to a folder, of what a seal covers: every file but hidden ones and seals."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in found
        if path.name not in (SEAL, SIGNATURE) and not any(part.startswith(".") for part in path.parts)
    )


def write_seal(folder: Path) -> Path:
    """Write the checksums of a folder.

    Raises:
        UserError: It cannot be written.
    """
    lines = [f"{_digest(folder / name)}  {name}\n" for name in sealed_files(folder)]
    path = folder / SEAL
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def broken_seal(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, problem) for everything that is not as it was sealed."""
    listed: dict[str, str] = {}
    for number, line in enumerate((folder / SEAL).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match is None or match[2] in listed:
            yield SEAL, f"line {number}: expected a sha256, two spaces and a file not named before"
            continue
        listed[match[2]] = match[1]
    present = set(sealed_files(folder))
    for name, digest in listed.items():
        if name not in present:
            yield name, f"is in {SEAL}, but missing: it was taken away"
        elif _digest(folder / name) != digest:
            yield name, f"is not the file that was sealed: its sha256 differs from {SEAL}"
    for name in sorted(present - set(listed)):
        yield name, f"is not in {SEAL}: it was added after sealing"


def signer_of(folder: Path, signers: Path) -> str:
    """Return who signed the seal of a folder.

    Args:
        folder: Folder with `SEAL` and `SIGNATURE`.
        signers: File of allowed signers, as ``ssh-keygen`` has it.

    Raises:
        UserError: ssh-keygen or a file is missing, or the signature is not of these bytes by one of them.
    """
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise UserError("--signers: needs ssh-keygen (Debian: apt-get install openssh-client)")
    for path in (folder / SEAL, folder / SIGNATURE, signers):
        if not path.is_file():
            raise UserError(f"--signers: expected the file {path}")
    signature = ["-s", str(folder / SIGNATURE)]
    found = _run([tool, "-Y", "find-principals", "-f", str(signers), *signature])
    names = found.stdout.decode(errors="replace").splitlines()
    if found.returncode or not names:
        raise UserError(f"{folder / SIGNATURE}: no signature by one of {signers}")
    verify = [tool, "-Y", "verify", "-f", str(signers), "-I", names[0], "-n", NAMESPACE, *signature]
    if _run(verify, (folder / SEAL).read_bytes()).returncode:
        raise UserError(f"{folder / SIGNATURE}: is not {names[0]}'s signature of this {SEAL}")
    return names[0]


def _run(command: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=given, capture_output=True, timeout=20, check=False)  # noqa: S603


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
