"""Versions on disk: tensors by the sha256 of their bytes, and manifests that name them.

    root/lock                             one process at a time
    root/objects/<aa>/<sha256>            bytes of a tensor; complete as soon as the name exists
    root/manifests/<model>/<number>.manifest   a version; it exists only after everything it names
    root/manifests/<model>/<number>.retired    what is left of a version that retention removed: its publish_id and digest
    root/scratch/                         files being written; emptied at the start

Blocking calls, safe from several threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded, Refused
from manyhands.weights.v1 import weights_pb2

from .files import TensorWriter, sync_folder, write_whole

logger = logging.getLogger(__name__)

# From "this tensor is here" to the stream that relies on it.
PROMISE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class StoredVersion:
    """A version that can be fetched.

    Attributes:
        order: Grows with each publishing of any model, for as long as this process lives.
        published_unix_s: On this machine's wall clock; it only ever leaves as an age.
    """

    manifest: weights_pb2.Manifest
    version: common_pb2.PolicyVersion
    order: int
    published_unix_s: float


class WeightsStore:
    """Args:
    root: Folder; made when it is not there.
    keep_versions: Newest versions of each model that are kept; 0 keeps all.
    max_version_bytes: Largest sum of a version's tensors.
    spare_bytes: Disk space that publishing never takes.
    grace_s: Tensors that came and that no version names, as those of a broken stream, stay for at least this long.
    wall_clock_s: Seconds since the epoch.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_versions: int = 0,
        max_version_bytes: int = 64 * 1024**3,
        spare_bytes: int = 256 * 1024**2,
        grace_s: float = 3600.0,
        wall_clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._objects = root / "objects"
        self._manifests = root / "manifests"
        self._scratch = root / "scratch"
        self._keep_versions = keep_versions
        self._max_version_bytes = max_version_bytes
        self._spare_bytes = spare_bytes
        self._grace_s = grace_s
        self._wall_clock_s = wall_clock_s
        self._lock = threading.RLock()
        self._pinned: Counter[bytes] = Counter()
        self._promised_unix_s: dict[bytes, float] = {}
        self._freed: set[bytes] = set()
        self._versions: dict[str, dict[int, StoredVersion]] = {}
        self._last_number: Counter[str] = Counter()
        self._last_order = 0
        self._by_publish_id: dict[tuple[str, str], common_pb2.PolicyVersion] = {}
        for folder in (self._objects, self._manifests, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{root} is in use by another weights service; give each its own", field="root") from None
        for leftover in self._scratch.iterdir():
            leftover.unlink()
        for index in range(256):
            (self._objects / f"{index:02x}").mkdir(exist_ok=True)
        # Names that an earlier process made may not be durable yet.
        self._dirty = {self._objects, *self._objects.iterdir()}
        self._load()
        self.collect()

    def close(self) -> None:
        self._lock_file.close()

    # Reading.

    def versions(self, model: str = "", *, after_order: int = 0) -> list[StoredVersion]:
        """Those of model, or of all models, in the order in which they were published."""
        with self._lock:
            models = [model] if model else list(self._versions)
            found = [version for name in models for version in self._versions.get(name, {}).values()]
        return sorted((version for version in found if version.order > after_order), key=lambda version: version.order)

    def get(self, model: str, number: int) -> StoredVersion:
        """Number 0 is the newest. Raises NotFound, which says what there is."""
        with self._lock:
            versions = self._versions.get(model, {})
            if not versions:
                known = ", ".join(sorted(name for name, some in self._versions.items() if some)) or "none yet"
                raise NotFound(f"no version of {model!r}; models with versions: {known}", field="model")
            wanted = number or max(versions)
            if wanted not in versions:
                raise NotFound(f"{model} has no version {wanted}; it has {min(versions)} to {max(versions)}", field="number")
            return versions[wanted]

    def missing(self, sha256s: Iterable[bytes]) -> list[bytes]:
        """Those the disk lacks. The others stay for PROMISE_S, so that publishing can begin."""
        lacking = []
        now = self._wall_clock_s()
        with self._lock:
            self._promised_unix_s = {s: at for s, at in self._promised_unix_s.items() if at >= now - PROMISE_S}
            for sha256 in sha256s:
                if self._object(sha256).exists():
                    self._promised_unix_s[sha256] = now
                else:
                    lacking.append(sha256)
        return lacking

    def open_tensor(self, sha256: bytes) -> BinaryIO:
        """Its bytes; they stay readable while the file is open, also when the version is retired meanwhile."""
        try:
            return self._object(sha256).open("rb")
        except FileNotFoundError:
            raise NotFound(f"tensor {sha256.hex()} is not here; its version may have been retired", field="sha256") from None

    def published_as(self, manifest: weights_pb2.Manifest) -> common_pb2.PolicyVersion | None:
        """The version that manifest's publish_id made; AlreadyExists when that one has other content."""
        with self._lock:
            version = self._by_publish_id.get((manifest.model, manifest.publish_id))
        if version is None:
            return None
        digest = weights_manifest.digest(manifest)
        if version.digest != digest:
            raise AlreadyExists(
                f"publish_id {manifest.publish_id!r} is version {version.number} of {manifest.model} with digest "
                f"{version.digest.hex()[:16]}, this content has {digest.hex()[:16]}; publish it under another id",
                field="publish_id",
            )
        return version

    # Writing.

    def admit(self, manifest: weights_pb2.Manifest) -> dict[bytes, int]:
        """Bytes of each tensor by sha256, after checking that there is room for those that are missing.

        Raises:
            InvalidInput: The version is larger than any may be.
            Overloaded: The disk is too full.
        """
        sizes = weights_manifest.digests(manifest)
        total = sum(sizes.values())
        if total > self._max_version_bytes:
            raise InvalidInput(
                f"has {total} bytes of tensors, over the limit of {self._max_version_bytes}; raise --max-version-gib",
                field="manifest.tensors",
            )
        needed = sum(sizes[sha256] for sha256 in self.missing(sizes))
        free = shutil.disk_usage(self._objects).free
        if needed and needed + self._spare_bytes > free:
            raise Overloaded(
                f"{needed} bytes are missing and {free} are free, {self._spare_bytes} of them kept back; free some disk or "
                "keep fewer versions (--keep-versions)",
                field="manifest.tensors",
                retry_after_s=60.0,
            )
        return sizes

    @contextlib.contextmanager
    def pinned(self, sha256s: Iterable[bytes]) -> Iterator[None]:
        """Inside, none of these tensors is collected."""
        kept = list(sha256s)
        with self._lock:
            self._pinned.update(kept)
        try:
            yield
        finally:
            with self._lock:
                self._pinned.subtract(kept)
                self._pinned += Counter()  # Drops the zeros.

    def writer(self, sha256: bytes, size_bytes: int) -> TensorWriter:
        path = self._object(sha256)
        with self._lock:
            self._dirty.add(path.parent)
        return TensorWriter(sha256=sha256, size_bytes=size_bytes, path=path, scratch=self._scratch)

    def publish(
        self, manifest: weights_pb2.Manifest, *, parent_number: int | None
    ) -> StoredVersion | common_pb2.PolicyVersion:
        """Makes the version; its tensors must be there.

        Returns:
            The new version, or the one that this publish_id made before.

        Raises:
            Conflict: parent_number is given and is not the newest.
            Refused: Names a tensor that is neither here nor came.
        """
        with self._lock:
            existing = self.published_as(manifest)
            if existing is not None:
                return existing
            newest = self._last_number[manifest.model]
            if parent_number is not None and parent_number != newest:
                raise Conflict(
                    f"parent_number {parent_number} is not the newest version of {manifest.model}, {newest}; fetch it first",
                    field="parent_number",
                )
            for entry in manifest.tensors:
                path = self._object(entry.sha256)
                if not path.exists():
                    raise Refused("is neither here nor came with this stream; ask FindMissing again", field=entry.name)
                if path.stat().st_size != weights_manifest.entry_bytes(entry):
                    raise InvalidInput(
                        f"needs {weights_manifest.entry_bytes(entry)} bytes, the tensor of this sha256 has "
                        f"{path.stat().st_size}",
                        field=entry.name,
                    )
            for folder in self._dirty:
                sync_folder(folder)
            self._dirty.clear()
            numbered = weights_pb2.Manifest()
            numbered.CopyFrom(manifest)
            numbered.number = newest + 1
            folder = self._manifests / manifest.model
            if not folder.exists():
                folder.mkdir()
                sync_folder(self._manifests)
            write_whole(folder / f"{numbered.number:012d}.manifest", numbered.SerializeToString(), scratch=self._scratch)
            return self._register(numbered, published_unix_s=self._wall_clock_s())

    def retire(self) -> int:
        """Removes versions beyond keep_versions and the tensors that only they named; answers how many tensors."""
        if not self._keep_versions:
            return 0
        with self._lock:
            for model, versions in self._versions.items():
                for number in sorted(versions)[: -self._keep_versions]:
                    stored = versions.pop(number)
                    self._retire_version(model, stored)
                    self._freed.update(entry.sha256 for entry in stored.manifest.tensors)
            self._freed -= self._named()
            removable = {sha256 for sha256 in self._freed if self._unclaimed(sha256)}
            for sha256 in removable:
                self._object(sha256).unlink(missing_ok=True)
            self._freed -= removable
            return len(removable)

    def collect(self) -> int:
        """Removes what no version names after the grace time: left by broken streams, or by a retirement cut short."""
        removed = 0
        with self._lock:
            named = self._named()
            oldest_kept = self._wall_clock_s() - self._grace_s
            for path in self._objects.glob("??/*"):
                sha256 = bytes.fromhex(path.name)
                if sha256 not in named and self._unclaimed(sha256) and path.stat().st_mtime < oldest_kept:
                    path.unlink()
                    removed += 1
        return removed

    # Inside.

    def _object(self, sha256: bytes) -> Path:
        weights_manifest.check_digest(sha256)
        name = sha256.hex()
        return self._objects / name[:2] / name

    def _named(self) -> set[bytes]:
        return {entry.sha256 for version in self.versions() for entry in version.manifest.tensors}

    def _unclaimed(self, sha256: bytes) -> bool:
        promised = self._promised_unix_s.get(sha256, -PROMISE_S)
        return not self._pinned[sha256] and promised + PROMISE_S <= self._wall_clock_s()

    def _register(self, manifest: weights_pb2.Manifest, *, published_unix_s: float) -> StoredVersion:
        self._last_order += 1
        stored = StoredVersion(
            manifest=manifest,
            version=weights_manifest.version_of(manifest),
            order=self._last_order,
            published_unix_s=published_unix_s,
        )
        self._versions.setdefault(manifest.model, {})[manifest.number] = stored
        self._last_number[manifest.model] = max(self._last_number[manifest.model], manifest.number)
        self._by_publish_id[manifest.model, manifest.publish_id] = stored.version
        return stored

    def _retire_version(self, model: str, stored: StoredVersion) -> None:
        folder = self._manifests / model
        note = {"publish_id": stored.manifest.publish_id, "digest": stored.version.digest.hex()}
        number = stored.version.number
        write_whole(folder / f"{number:012d}.retired", json.dumps(note).encode(), scratch=self._scratch)
        (folder / f"{number:012d}.manifest").unlink(missing_ok=True)
        logger.info("retired version %d of %s", number, model)

    def _load(self) -> None:
        """Reads every manifest. One that cannot be read is not served, and its number is not given again."""
        found: list[tuple[float, weights_pb2.Manifest]] = []
        for folder in sorted(path for path in self._manifests.iterdir() if path.is_dir()):
            published_unix_s = 0.0
            for path in sorted(folder.glob("[0-9]*.*")):
                number = int(path.stem)
                self._last_number[folder.name] = max(self._last_number[folder.name], number)
                if path.suffix == ".retired":
                    note = json.loads(path.read_text())
                    self._by_publish_id[folder.name, note["publish_id"]] = common_pb2.PolicyVersion(
                        model=folder.name, number=number, digest=bytes.fromhex(note["digest"])
                    )
                elif path.with_suffix(".retired").exists():
                    path.unlink()  # The process ended between the two steps of a retirement.
                else:
                    manifest = self._read_manifest(path, model=folder.name, number=number)
                    if manifest is not None:
                        # The wall clock may have been set back between two versions; their numbers were not.
                        published_unix_s = max(published_unix_s, path.stat().st_mtime)
                        found.append((published_unix_s, manifest))
        for published_unix_s, manifest in sorted(found, key=lambda item: (item[0], item[1].model, item[1].number)):
            self._register(manifest, published_unix_s=published_unix_s)

    def _read_manifest(self, path: Path, *, model: str, number: int) -> weights_pb2.Manifest | None:
        try:
            manifest = weights_pb2.Manifest.FromString(path.read_bytes())
            weights_manifest.check(manifest)
        except (DecodeError, InvalidInput) as error:
            logger.error("version %d of %s is not served: %s cannot be read: %s", number, model, path, error)
            return None
        if (manifest.model, manifest.number) != (model, number):
            logger.error("%s is not served: it says version %d of %s", path, manifest.number, manifest.model)
            return None
        for entry in manifest.tensors:
            tensor = self._object(entry.sha256)
            if not tensor.exists() or tensor.stat().st_size != weights_manifest.entry_bytes(entry):
                logger.error("version %d of %s is not served: tensor %s is missing or short", number, model, entry.name)
                return None
        return manifest


@contextlib.contextmanager
def full_disk_as_overloaded() -> Iterator[None]:
    """Inside, a full disk is an answer for the learner and not an incident."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Overloaded(
            "the disk of the weights service is full; free some or keep fewer versions", retry_after_s=60.0
        ) from None
