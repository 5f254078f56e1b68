"""Writing so that a file is there whole or not at all, also after kill -9 or a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path
from types import TracebackType

from manyhands.errors import InvalidInput


def sync_folder(folder: Path) -> None:
    """Makes the names in folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes, *, scratch: Path) -> None:
    """Writes path through a temporary file in scratch (same file system) and makes its name durable."""
    temporary = scratch / uuid.uuid4().hex
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


class TensorWriter:
    """One tensor on its way to disk. Leaving the context without finish() leaves nothing behind."""

    def __init__(self, *, sha256: bytes, size_bytes: int, path: Path, scratch: Path) -> None:
        self.sha256 = sha256
        self.offset = 0
        self._size_bytes = size_bytes
        self._path = path
        self._temporary = scratch / uuid.uuid4().hex
        self._file = self._temporary.open("wb")
        self._hasher = hashlib.sha256()

    def write(self, offset: int, data: bytes) -> None:
        """Raises InvalidInput for a hole, or for more bytes than the manifest says, before they touch the disk."""
        if offset != self.offset:
            raise InvalidInput(f"offset {offset} does not follow; {self.offset} bytes came", field=self.label)
        if offset + len(data) > self._size_bytes:
            raise InvalidInput(f"has more than the {self._size_bytes} bytes its manifest says", field=self.label)
        self._file.write(data)
        self._hasher.update(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Under its digest on disk. Raises InvalidInput when it is short or something else than its digest says."""
        if self.offset != self._size_bytes:
            raise InvalidInput(f"ended after {self.offset} of {self._size_bytes} bytes", field=self.label)
        if self._hasher.digest() != self.sha256:
            raise InvalidInput(f"its bytes have the sha256 {self._hasher.hexdigest()}", field=self.label)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)

    @property
    def label(self) -> str:
        return f"tensor {self.sha256.hex()}"

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()
