"""Storage under a run: mounts of its own, which need root, images of them, and a layer that refuses."""

import contextlib
import errno
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("storage.c")
ERRNO = {"quota": errno.EDQUOT, "read_only": errno.EROFS, "raises": errno.EIO}
IMAGE_BYTES, ROOM_BYTES = 32 * 2**20, 32 * 2**20


@contextlib.contextmanager
def _mounted(*arguments: str, at: Path) -> Iterator[Path]:
    at.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(
            f"faults.py: this fault needs mounts of its own, hence root ({result.stderr.strip()})"
        )
    try:
        yield at
    finally:
        deadline = time.monotonic() + 10
        while subprocess.run(["umount", str(at)], capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{at} is still in use")
            time.sleep(0.1)
        at.rmdir()


@contextlib.contextmanager
def loop(image: Path, at: Path) -> Iterator[Path]:
    """An ext4 file system in a file, made if missing; its journal is replayed as after a power cut."""
    if not image.exists():
        with image.open("wb") as stream:
            stream.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with _mounted("-o", "loop", str(image), at=at) as place:
        yield place


def tmpfs(at: Path) -> contextlib.AbstractContextManager[Path]:
    """A file system in memory, of `ROOM_BYTES`."""
    return _mounted("-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "tmpfs", at=at)


def copy_image(image: Path, to: Path) -> int:
    """Copies the image of a mounted file system, without a sync, as it is at one moment.

    What the file system has not yet written to its device is not in the copy. It is made again while the device
    was written to meanwhile; returns how often it was made.
    """
    statistics = _statistics(image)
    for count in range(1, 1000):
        before = statistics.read_text().split()
        shutil.copyfile(image, to)
        after = statistics.read_text().split()
        # Writes that are done (the fifth number) and requests that are not (the ninth).
        if before[4] == after[4] and before[8] == after[8] == "0":
            return count
    raise RuntimeError("the file system is never at rest")


def _statistics(image: Path) -> Path:
    listed = subprocess.run(
        ["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path("/sys/block", Path(listed.stdout.strip()).name, "stat")


class Fault:
    """One of `full`, `quota`, `read_only` and `raises`, from `begin` to `end`, of what lies under a folder."""

    def __init__(self, out: Path, place: Path, kind: str) -> None:
        self._control, self._place, self._kind = out / "control", place, kind
        self._filler = place / "filler"

    def begin(self) -> None:
        """The storage refuses from here on."""
        if self._kind != "full":
            self._set(ERRNO[self._kind])
            return
        with self._filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(2**16 if shutil.disk_usage(self._place).free > 2**17 else 2**12))

    def end(self) -> None:
        """The storage works again."""
        self._set(0)
        self._filler.unlink(missing_ok=True)

    def _set(self, code: int) -> None:
        with self._control.open("r+b") as stream:
            stream.write(struct.pack("i", code))


def build(folder: Path) -> Path:
    """Compiles the layer that refuses."""
    library, compiler = folder / "storage.so", shutil.which("cc")
    if compiler is None:
        sys.exit("faults.py: this fault needs a C compiler (cc)")
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def preload(out: Path, prefix: Path) -> None:
    """Has this process and its children obey `Fault`: starts the program anew, with the layer below it."""
    control = out.absolute() / "control"
    if os.environ.get("FAULT_CONTROL") == str(control):
        return
    control.parent.mkdir(parents=True, exist_ok=True)
    control.write_bytes(struct.pack("i", 0))
    library = build(control.parent)
    os.environ |= {
        "LD_PRELOAD": str(library),
        "FAULT_CONTROL": str(control),
        "FAULT_PREFIX": f"{prefix.absolute()}/",
    }
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
