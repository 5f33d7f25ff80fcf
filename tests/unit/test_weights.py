"""Manifests and the publisher: digests name contents, files appear whole, the dead leave nothing behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ConfigError, StorageError, WeightsError
from asyncrl.messages.version import Manifest
from asyncrl.weights.files import run_id
from asyncrl.weights.manifest import digest_of, layout, size_of, tensors_of, verify
from asyncrl.weights.publisher import Publisher

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    tensors["embed"] = torch.randn(7, 11, generator=generator)
    tensors["head"] = tensors["embed"]
    tensors["transposed"] = tensors["embed"].t()
    tensors["scalar"] = torch.tensor(3.5, dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0, 4)
    tensors["grad"] = torch.nn.Parameter(torch.randn(4, generator=generator))
    return tensors


def publisher(directory: Path, **options: Any) -> Publisher:
    return Publisher(directory, **{"run_id": "run", "incarnation": 1, **options})


def publish(made: Publisher, version: int, tensors: dict[str, torch.Tensor] | None = None) -> Manifest:
    return made.write(made.snapshot(tensors or model(version)), version=version, step=2 * version)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=8))
def test_a_layout_is_aligned_and_nothing_overlaps(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{n}": torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in enumerate(shapes)}
    entries = layout(tensors)
    assert [entry.name for entry in entries] == sorted(tensors)
    end = 0
    for entry in entries:
        assert entry.offset % 64 == 0
        assert entry.offset >= end
        assert entry.num_bytes == tensors[entry.name].numel() * tensors[entry.name].element_size()
        end = entry.offset + entry.num_bytes
    assert size_of(entries) == end


def test_tied_tensors_lie_in_a_version_once_and_views_of_them_do_not() -> None:
    entries = {entry.name: entry for entry in layout(model())}
    assert entries["embed"].offset == entries["head"].offset
    assert entries["transposed"].offset != entries["embed"].offset


def test_the_digest_is_of_contents_and_of_nothing_else() -> None:
    tensors = model()
    untied = {name: tensor.detach().clone() for name, tensor in reversed(tensors.items())}
    assert digest_of(untied) == digest_of(tensors)
    for name, tensor in untied.items():
        if tensor.numel():
            changed = tensor.clone(memory_format=torch.contiguous_format)
            changed.reshape(-1)[-1] = 1 - changed.reshape(-1)[-1].to(torch.int64)
            assert digest_of({**untied, name: changed}) != digest_of(tensors), name
    assert digest_of({**untied, "embed": untied["embed"].reshape(11, 7)}) != digest_of(tensors)
    assert digest_of({**untied, "more": torch.zeros(1)}) != digest_of(tensors)
    renamed = {("other" if name == "embed" else name): tensor for name, tensor in untied.items()}
    assert digest_of(renamed) != digest_of(tensors)


def test_a_version_reads_back_to_the_bit_and_has_the_digest_of_its_tensors(tmp_path: Path) -> None:
    tensors = model()
    made = publisher(tmp_path)
    manifest = publish(made, 3, tensors)
    buffer = bytearray(Path(manifest.path).read_bytes())
    verify(manifest, buffer)
    again = tensors_of(manifest, buffer)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert manifest.digest == digest_of(tensors)
    assert (manifest.version, manifest.incarnation, manifest.step) == (3, 1, 6)
    made.close()


def test_tensors_are_views_and_not_copies() -> None:
    made = [("w", torch.arange(4, dtype=torch.float32))]
    entries = layout(dict(made))
    buffer = bytearray(16)
    manifest = Manifest(
        run_id="r", version=0, incarnation=1, step=0, digest="", num_bytes=16, tensors=entries
    )
    view = tensors_of(manifest, buffer)["w"]
    buffer[4:8] = b"\0\0\x80\x3f"
    assert view.tolist() == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="writable"):
        tensors_of(manifest, bytes(16))


def test_verify_names_the_tensor_that_is_bad(tmp_path: Path) -> None:
    made = publisher(tmp_path)
    manifest = publish(made, 0)
    data = Path(manifest.path).read_bytes()
    for entry in manifest.tensors:
        if entry.num_bytes and entry.name != "head":
            damaged = bytearray(data)
            damaged[entry.offset + entry.num_bytes - 1] ^= 1
            with pytest.raises(WeightsError, match=f"tensor '{entry.name}' has digest"):
                verify(manifest, damaged)
    with pytest.raises(WeightsError, match=f"{len(data) - 1} bytes instead of {len(data)}"):
        verify(manifest, data[:-1])
    made.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 32}, "multiple of 64"),
        ({"offset": -64}, "multiple of 64"),
        ({"offset": 1 << 40}, "behind the last byte"),
        ({"num_bytes": 4}, "is not float32"),
        ({"shape": [-1, -8]}, "impossible shape"),
        ({"dtype": "load"}, "unknown dtype 'load'"),
        ({"dtype": "float16"}, "is not float16"),
    ],
)
def test_an_impossible_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = publisher(tmp_path)
    manifest = publish(made, 0, {"w": torch.ones(2, 4)})
    bad = msgspec.structs.replace(manifest, tensors=[msgspec.structs.replace(manifest.tensors[0], **change)])
    with pytest.raises(WeightsError, match=message):
        verify(bad, Path(manifest.path).read_bytes())
    forged = msgspec.structs.replace(manifest, digest="0" * 32)
    with pytest.raises(WeightsError, match="do not have its digest"):
        verify(forged, Path(manifest.path).read_bytes())
    made.close()


def test_a_snapshot_is_of_its_moment_whatever_the_trainer_does_next(tmp_path: Path) -> None:
    made = publisher(tmp_path)
    weights = {"w": torch.ones(1000)}
    before = digest_of(weights)
    snapshot = made.snapshot(weights)
    weights["w"].add_(1)
    second = made.snapshot(weights)
    assert made.write(snapshot, version=1, step=1).digest == before
    assert made.write(second, version=2, step=2).digest == digest_of(weights)
    made.close()


def test_buffers_are_used_again_and_never_more_than_two(tmp_path: Path) -> None:
    made = publisher(tmp_path)
    first, second = made.snapshot(model(1)), made.snapshot(model(2))
    places = {first.staging.data_ptr(), second.staging.data_ptr()}
    with pytest.raises(ValueError, match="not written yet"):
        made.snapshot(model(3))
    made.write(first, version=1, step=1)
    made.discard(second)
    made.discard(second)
    third, fourth = made.snapshot(model(3)), made.snapshot(model(4))
    assert {third.staging.data_ptr(), fourth.staging.data_ptr()} == places
    made.close()


def test_a_snapshot_may_be_written_on_another_thread_beside_the_next(tmp_path: Path) -> None:
    made = publisher(tmp_path, keep=8)
    for version in range(1, 7):
        snapshot = made.snapshot(model(version))
        writer = threading.Thread(target=made.write, args=(snapshot,), kwargs={"version": version, "step": 0})
        writer.start()
        made.discard(made.snapshot(model(99)))
        writer.join(timeout=30)
    assert [m.digest for m in made.published()] == [digest_of(model(v)) for v in range(1, 7)]
    made.close()


def test_retire_keeps_the_newest(tmp_path: Path) -> None:
    made = publisher(tmp_path, keep=2)
    manifests = {version: publish(made, version) for version in (1, 2, 3, 4)}
    assert [made.retire(version) for version in (4, 3, 2, 1)] == [False, False, True, True]
    assert [Path(manifests[v].path).exists() for v in (1, 2, 3, 4)] == [False, False, True, True]
    assert made.path_of(manifests[1].digest) is None
    assert made.path_of(manifests[4].digest) == Path(manifests[4].path)
    assert made.retire(77)
    made.close()


def test_close_removes_its_own_files_and_nothing_else(tmp_path: Path) -> None:
    other = publisher(tmp_path, run_id="other")
    kept = publish(other, 1)
    (tmp_path / "asyncrl-run.txt").write_text("the user's")
    (tmp_path / "asyncrl-run.i1.v.i1.v000001.weights").write_text("of a run named run.i1.v")
    made = publisher(tmp_path)
    publish(made, 1)
    made.close()
    made.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {Path(kept.path).name, "asyncrl-other.i1.lock", "asyncrl-run.txt"} | {
        "asyncrl-run.i1.v.i1.v000001.weights"
    }
    other.close()


def test_runs_of_one_name_in_two_places_share_a_host(tmp_path: Path) -> None:
    """Fails when a run's name alone names its versions: the second trainer would be refused."""
    shm, one, two = tmp_path / "shm", tmp_path / "one" / "run", tmp_path / "two" / "run"
    for place in (shm, one, two):
        place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(one)
    assert run_id("run", tmp_path / "link") == run_id("run", str(one))
    made = [publisher(shm, run_id=run_id("run", place)) for place in (one, two)]
    paths = [Path(publish(each, 1).path) for each in made]
    made[0].close()
    assert [path.exists() for path in paths] == [False, True]
    made[1].close()


def test_a_write_that_fails_leaves_no_file_and_gives_the_buffer_back(tmp_path: Path) -> None:
    made = publisher(tmp_path)
    with largest_file(100):
        for _ in range(3):
            with pytest.raises(StorageError, match="cannot be written"):
                publish(made, 1)
    assert made.published() == []
    assert [path.name for path in tmp_path.iterdir()] == ["asyncrl-run.i1.lock"]
    assert publish(made, 1).digest == digest_of(model(1))
    made.close()


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel lets no file of this process grow further, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def publish_and_wait(directory: Path, ready: Any) -> None:
    made = publisher(directory)
    publish(made, 1)
    ready.set()
    threading.Event().wait(60)


def test_what_a_killed_publisher_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=publish_and_wait, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError, match="is alive"):
            publisher(tmp_path)
        second = publisher(tmp_path, incarnation=2)
        assert len(list(tmp_path.glob("*.i1.*.weights"))) == 1
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        third = publisher(tmp_path, incarnation=3)
        assert not list(tmp_path.glob("*.i1.*"))
        second.close()
        third.close()
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.join(30)


@pytest.mark.parametrize(
    ("options", "message"), [({"run_id": "../x"}, "file name"), ({"keep": 0}, "keep = 0")]
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        publisher(tmp_path, **options)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        publisher(tmp_path / "file" / "weights")
