"""The trainer's side of a version: a snapshot that is quick, and a file that is written beside the next step.

    snapshot = publisher.snapshot(model.state_dict())          the trainer stands still for this copy only
    manifest = await asyncio.to_thread(publisher.write, snapshot, version=12, step=24)

It owns the files PREFIX-RUN.iI.vV.weights of its directory and the lock file beside them, which a living
publisher holds; files whose lock nobody holds are of the dead and are removed at start. A file appears whole,
under its final name, or not at all. It announces nothing and decides nothing about when a version exists.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from asyncrl.errors import ConfigError, StorageError
from asyncrl.messages.version import Manifest, TensorEntry
from asyncrl.weights import files
from asyncrl.weights import manifest as manifests
from asyncrl.weights.host import host_identity

MAX_SNAPSHOTS = 2
"""One that is being written and one just taken; more would hide a writer that cannot keep up."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Snapshot:
    """A copy of the weights that is not written yet. Goes back to its publisher by `write` or `discard`."""

    def __init__(self, staging: torch.Tensor, entries: list[TensorEntry]) -> None:
        self.staging = staging
        self.entries = entries

    @property
    def num_bytes(self) -> int:
        """Bytes of the version."""
        return manifests.size_of(self.entries)


class Publisher:
    """Writes versions into a directory and takes them back. One thread may snapshot while another writes."""

    def __init__(
        self,
        directory: Path | str,
        *,
        run_id: str,
        incarnation: int,
        keep: int = 2,
        prefix: str = files.PREFIX,
        address: str = "",
    ) -> None:
        """Take over a directory for one run and one life of its trainer.

        Args:
            directory: where files go: /dev/shm for receivers on this host, or a run directory.
            run_id: letters, digits, "_", "." and "-".
            incarnation: which life of the trainer this is.
            keep: versions that `retire` leaves alone, the newest ones; 1 or more.
            prefix: start of the file names, of the same letters as `run_id`.
            address: of the stream endpoint, where there is one; goes into every manifest.

        Raises:
            ConfigError: a name cannot be a file name, or another publisher of this life is alive.
            StorageError: the directory cannot be used.
        """
        for name in (run_id, prefix):
            if not _SAFE_NAME.fullmatch(name):
                raise ConfigError(f'{name!r} cannot be in a file name; use letters, digits, "_", "." and "-"')
        if keep < 1:
            raise ConfigError(f"keep = {keep}: at least the newest version has to be kept, so 1 or more")
        self.address = address
        self._directory = Path(directory)
        self._run_id = run_id
        self._incarnation = incarnation
        self._keep = keep
        self._stem = f"{prefix}-{run_id}.i"
        self._mutex = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._num_taken = 0
        self._published: dict[int, Manifest] = {}
        self._lock = self._start()

    def snapshot(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """Copy tensors of any device and layout into a buffer that is used again and again.

        Raises:
            ValueError: MAX_SNAPSHOTS are neither written nor discarded yet.
        """
        entries = manifests.layout(tensors)
        snapshot = Snapshot(self._take_buffer(manifests.size_of(entries)), entries)
        manifests.copy_into(snapshot.staging, tensors, entries=entries)
        return snapshot

    def write(self, snapshot: Snapshot, *, version: int, step: int) -> Manifest:
        """Digest a snapshot and write it as a version. Takes a while; meant for a thread of its own.

        The snapshot is used up, whatever happens. A version that was written before is replaced.

        Raises:
            StorageError: the file cannot be written; what there is of it is removed.
        """
        path = self._path(version)
        try:
            data = snapshot.staging.numpy().data[: snapshot.num_bytes]
            entries = manifests.with_digests(snapshot.entries, data)
            _write_whole(path, data)
        finally:
            self.discard(snapshot)
        manifest = Manifest(
            run_id=self._run_id,
            version=version,
            incarnation=self._incarnation,
            step=step,
            digest=manifests.digest_of_entries(entries),
            num_bytes=len(data),
            tensors=entries,
            path=str(path),
            host=host_identity(),
            address=self.address,
        )
        with self._mutex:
            self._published[version] = manifest
        return manifest

    def discard(self, snapshot: Snapshot) -> None:
        """Give a snapshot's buffer back unwritten. May be called twice."""
        staging, snapshot.staging = snapshot.staging, torch.empty(0, dtype=torch.uint8)
        with self._mutex:
            if staging.numel():
                self._num_taken -= 1
                self._free.append(staging)

    def retire(self, version: int) -> bool:
        """Remove a version's file, unless it is one of the newest `keep`. Whether it is gone now.

        Receivers that have it mapped keep it; those in the middle of streaming it are told.
        """
        with self._mutex:
            if version in sorted(self._published)[-self._keep :]:
                return False
            self._published.pop(version, None)
        self._path(version).unlink(missing_ok=True)
        return True

    def published(self) -> list[Manifest]:
        """Manifests of the versions whose files are there, oldest first."""
        with self._mutex:
            return [self._published[version] for version in sorted(self._published)]

    def path_of(self, digest: str) -> Path | None:
        """The file of a version with this digest, or None where there is none (any more)."""
        matches = [m.path for m in self.published() if m.digest == digest]
        return Path(matches[-1]) if matches else None

    def close(self) -> None:
        """Remove all files of this publisher. May be called twice."""
        with self._mutex:
            self._published.clear()
            self._free.clear()
        if not self._lock.closed:
            files.remove_files_of(self._directory, self._stem, life=self._incarnation)
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()

    def _start(self) -> IO[bytes]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                lock = undo.enter_context(self._lock_path(self._incarnation).open("ab"))
                if not files.try_lock(lock):
                    raise ConfigError(
                        f"{self._directory}: trainer {self._incarnation} of run {self._run_id} is alive and "
                        "publishes there; stop it first"
                    )
                files.remove_dead(self._directory, self._stem, alive=self._incarnation)
                undo.pop_all()
        except OSError as error:
            raise StorageError(f"{self._directory}: weights cannot be published there: {error}") from error
        return lock

    def _path(self, version: int) -> Path:
        return self._directory / f"{self._stem}{self._incarnation}.v{version:06d}.weights"

    def _lock_path(self, incarnation: int) -> Path:
        return self._directory / f"{self._stem}{incarnation}.lock"

    def _take_buffer(self, num_bytes: int) -> torch.Tensor:
        with self._mutex:
            if self._num_taken >= MAX_SNAPSHOTS:
                raise ValueError(
                    f"{MAX_SNAPSHOTS} snapshots are not written yet; wait for `write`, or `discard` one"
                )
            self._num_taken += 1
            fitting = [b for b in self._free if b.numel() >= num_bytes]
            self._free.clear()
            if fitting:
                self._free.extend(fitting[1:])
                return fitting[0]
        # Never empty, so that `discard` can tell a buffer from the mark of one given back.
        return torch.empty(max(num_bytes, 1), dtype=torch.uint8)


def _write_whole(path: Path, data: memoryview) -> None:
    """Write under a temporary name, then rename. Raises StorageError."""
    temporary = path.with_suffix(".tmp")
    try:
        # No sync: after a crash of the machine the trainer publishes again from its checkpoint.
        with temporary.open("wb", buffering=0) as file:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: {len(data)} bytes of weights cannot be written: {error.strerror}; free space there, or "
            "publish into another directory"
        ) from error
