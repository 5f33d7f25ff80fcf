"""Checkpoints: a Hugging Face export with what training needs to go on from it, in one directory.

    step-000200/                 200 rollout steps are in these weights
        config.json, *.safetensors, tokenizer files      loadable by transformers as it stands
        trainer/state.json       step counters, Python and numpy random state, options, reference
        trainer/*.safetensors    optimizer, random; critic and its optimizer, reference, old actors where
                                 the run has them and they change
        files.json               every other file with its size and xxh3-128, written last

Owns the layout and its durability. Never unpickles anything. Invariants: a directory named step-* was
complete and synced when it got that name; a file that was torn, cut or changed since does not verify, and the
directory is then no checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncrl.errors import ConfigError, StorageError
from asyncrl.train.backend import TrainPlan
from asyncrl.train.objective import needs_reference

FILES = "files.json"
TRAINER = "trainer"
FORMAT = 2
"""Number of the layout; another one is refused."""
PREFIX = "step-"
READ_BYTES = 1 << 22
"""Files are hashed in pieces of this size."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
"""Files of a model directory that an export replaces, beside config.json."""


class RandomState(NamedTuple):
    """The random number generators of the process."""

    torch: dict[str, Tensor]
    """uint8 states: "cpu", and "cuda" where there is a device."""
    python: list[Any]
    numpy: dict[str, Any]


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Where training stands."""

    rollout_step: int
    """Rollout steps in the weights."""
    step: int
    """Optimizer steps of those."""
    updates: int
    """Optimizer steps of the actor, its learning rate's place in the schedule."""
    critic_updates: int = 0


class Stored(NamedTuple):
    """What `read` finds beside the weights."""

    counters: Counters
    plan: dict[str, Any]
    """The TrainPlan it was made under, as builtins."""
    reference: dict[str, str] | None
    tensors: dict[str, dict[str, Tensor]]
    """By file: "optimizer" always."""
    random: RandomState


def name_of(rollout_step: int) -> str:
    """The directory name of a checkpoint."""
    return f"{PREFIX}{rollout_step:06d}"


def save(
    directory: Path,
    *,
    model: Any,
    tensors: dict[str, dict[str, Tensor]],
    plan: TrainPlan,
    counters: Counters,
) -> Path:
    """Write `directory`/step-NNNNNN; one of the same name is replaced. Raises StorageError.

    `tensors` by file name below trainer/, without its suffix.
    """
    final = directory / name_of(counters.rollout_step)
    temporary = directory / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / TRAINER).mkdir(parents=True)
        export_hf(model, temporary, hf_checkpoint=Path(plan.trainer.hf_checkpoint))
        _write_state(temporary / TRAINER, tensors=tensors, plan=plan, counters=counters)
        _seal(temporary)
        _replace(temporary, final)
    except OSError as error:
        raise StorageError(f"checkpoint {final}: cannot be written: {error}") from error
    return final


def export_hf(model: Any, directory: Path, *, hf_checkpoint: Path) -> None:
    """Write model and configuration, and copy tokenizer and generation files of the initial model."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    for path in sorted(hf_checkpoint.iterdir()):
        replaced = path.name in {"config.json", FILES} or path.name.endswith(WEIGHT_SUFFIXES)
        if path.is_file() and not replaced:
            shutil.copyfile(path, directory / path.name)


def read(directory: Path) -> Stored:
    """Everything but the weights. Raises StorageError if it is torn, ConfigError for another format."""
    problem = defect(directory)
    if problem is not None:
        raise StorageError(f"checkpoint {directory}: {problem}; take an older one")
    state = msgspec.json.decode((directory / TRAINER / "state.json").read_bytes())
    if state["format"] != FORMAT:
        raise ConfigError(f"checkpoint {directory}: format {state['format']}; this version reads {FORMAT}")
    tensors = {path.stem: load_file(path) for path in sorted((directory / TRAINER).glob("*.safetensors"))}
    return Stored(
        counters=msgspec.convert(state["counters"], Counters),
        plan=state["plan"],
        reference=state["reference"],
        random=RandomState(
            torch=tensors.pop("random"),
            python=state["random"]["python"],
            numpy=state["random"]["numpy"],
        ),
        tensors=tensors,
    )


def defect(directory: Path) -> str | None:
    """Why the directory is no complete checkpoint; None when every file is as it was written."""
    try:
        files = msgspec.json.decode((directory / FILES).read_bytes(), type=dict[str, tuple[int, str]])
        for name, (num_bytes, digest) in files.items():
            path = directory / name
            if path.stat().st_size != num_bytes:
                return f"{name} has {path.stat().st_size} bytes, not {num_bytes}"
            if file_digest(path) != digest:
                return f"{name} does not have its digest"
    except OSError as error:
        return f"{error.strerror or error}: {error.filename}"
    except msgspec.DecodeError as error:
        return f"{FILES}: {error}"
    return None


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint below `directory`; None when there is none."""
    return next((path for path in reversed(_all(directory)) if defect(path) is None), None)


def prune(directory: Path, *, keep: int) -> list[Path]:
    """Delete all but the `keep` newest checkpoints; returns what was deleted. Raises StorageError."""
    doomed = _all(directory)[: -max(keep, 1)]
    try:
        for path in doomed:
            # Without its list a half-deleted directory is no checkpoint.
            (path / FILES).unlink(missing_ok=True)
            shutil.rmtree(path)
    except OSError as error:
        raise StorageError(f"checkpoints in {directory}: cannot delete {error.filename}: {error}") from error
    return doomed


def check_same_reference(stored: Stored, *, plan: TrainPlan) -> None:
    """Raise ConfigError when the KL loss would go on against other reference weights than before."""
    now = _reference(plan)
    if now and stored.reference and now["digest"] != stored.reference["digest"]:
        raise ConfigError(
            f"trainer.ref_load: {now['directory']} does not hold the reference weights of the checkpoint "
            f"({stored.reference['directory']}); name the directory they are in"
        )


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, hex."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
    return str(hasher.hexdigest())


def random_state() -> RandomState:
    """The state of torch's, Python's and numpy's global generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    numpy_state = dict(np.random.get_state(legacy=False))  # noqa: NPY002 -- plug-ins may use the global one
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    version, internal, gauss = random.getstate()
    return RandomState(torch=states, python=[version, list(internal), gauss], numpy=numpy_state)


def set_random_state(state: RandomState) -> None:
    """Put the global generators where they were."""
    torch.set_rng_state(state.torch["cpu"])
    if "cuda" in state.torch and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.torch["cuda"])
    inner = {"key": np.array(state.numpy["state"]["key"], np.uint32), "pos": state.numpy["state"]["pos"]}
    np.random.set_state({**state.numpy, "state": inner})  # noqa: NPY002 -- plug-ins may use the global one
    version, internal, gauss = state.python
    random.setstate((version, tuple(internal), gauss))


def _write_state(
    directory: Path, *, tensors: dict[str, dict[str, Tensor]], plan: TrainPlan, counters: Counters
) -> None:
    state = random_state()
    for file, named in {**tensors, "random": state.torch}.items():
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(contiguous, directory / f"{file}.safetensors")
    content = {
        "format": FORMAT,
        "counters": counters,
        "plan": msgspec.to_builtins(msgspec.structs.replace(plan, options={})),
        "reference": _reference(plan),
        "random": {"python": state.python, "numpy": state.numpy},
        "torch": str(torch.__version__),
    }
    (directory / "state.json").write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def _reference(plan: TrainPlan) -> dict[str, str] | None:
    """Where the reference weights are and a digest of their files; None without a KL loss."""
    if not needs_reference(plan.algorithm):
        return None
    directory = Path(plan.trainer.ref_load or plan.trainer.hf_checkpoint)
    hasher = xxhash.xxh3_128()
    for path in sorted(directory.glob("*.safetensors")):
        hasher.update(file_digest(path).encode())
    return {"directory": str(directory), "digest": str(hasher.hexdigest())}


def _all(directory: Path) -> list[Path]:
    """Directories named like checkpoints, oldest first."""
    found = {path: path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*") if path.is_dir()}
    return sorted((path for path, number in found.items() if number.isdecimal()), key=lambda p: int(found[p]))


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _seal(directory: Path) -> None:
    """Sync every file, then write and sync the list of them."""
    listed = {}
    for path in _files(directory):
        _sync(path)
        listed[str(path.relative_to(directory))] = (path.stat().st_size, file_digest(path))
    (directory / FILES).write_bytes(msgspec.json.format(msgspec.json.encode(listed), indent=1))
    _sync(directory / FILES)
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _sync(path)


def _replace(temporary: Path, final: Path) -> None:
    """Give the directory its name; a rename cannot replace a directory with files, so that goes first."""
    if final.exists():
        (final / FILES).unlink(missing_ok=True)
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
