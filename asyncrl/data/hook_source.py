"""Adapts a slime or Miles data source class (`data_source_path`) to `PromptSource`.

The class is the user's: `Class(args)` with `get_samples(n) -> list of groups of samples`, `save(rollout_id)`,
`load(rollout_id)`, and perhaps `__len__` or `.dataset`. Owns the directory that the class saves into
(`args.save` and `args.load` name it); no state of the class goes over a wire, a cursor holds a rollout_id and
the names of the files. Only prompt, label and metadata of a group's first sample are used: unfinished work
lives in the buffer, so `add_samples` is never called. Whatever the class raises or returns wrongly is a
DataError that names the class and the method.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.data.jsonl import LineError
from asyncrl.data.prompts import PromptBuilder
from asyncrl.data.source import SourceStatistics
from asyncrl.errors import DataError, PluginError
from asyncrl.messages.sample import Prompt

METHODS = ("get_samples", "save", "load")
# Calls in a row in which every prompt is over the length limit, after which the source fails by name.
MAX_FRUITLESS_CALLS = 100


class _Position(msgspec.Struct, frozen=True, kw_only=True):
    """A HookSource's cursor."""

    rollout_id: int
    """What `save` was called with; -1 before the first prompt, where nothing was saved."""
    files: list[str] = []
    """What that `save` wrote, relative to the directory."""
    yielded: int = 0
    filtered: int = 0
    exhausted: bool = False


class HookSource:
    """Prompts of a user's data source class, one per group."""

    def __init__(self, hook: Any, *, where: str, directory: str | Path, builder: PromptBuilder) -> None:
        """`hook` is an instance; `where` names it in errors. PluginError: it lacks a method."""
        missing = [name for name in METHODS if not callable(getattr(hook, name, None))]
        if missing:
            raise PluginError(
                f"{where}: a data source needs {', '.join(METHODS)} and lacks {', '.join(missing)}; "
                "its interface: get_samples(n), add_samples(groups), save(rollout_id), load(rollout_id)."
            )
        self._hook = hook
        self._where = where
        self._directory = Path(directory)
        self._builder = builder
        self._at = _Position(rollout_id=-1)
        self._saved = self._at

    @classmethod
    def open(
        cls,
        path: str,
        *,
        args: Any,
        directory: str | Path,
        builder: PromptBuilder,
        option: str = "data_source_path",
    ) -> HookSource:
        """Loads the class that `path` names and makes `Class(args)`, with `directory` as save and load.

        `args` is copied before its `save` and `load` are set. PluginError: the class cannot be loaded, made
        or used.
        """
        from asyncrl.topology import plugins

        factory = plugins.load(path, what=option)
        if not callable(factory):
            raise PluginError(f'{option}: "{path}" is of type {type(factory).__name__}, not a class')
        args = copy.copy(args)
        args.save = args.load = str(directory)
        Path(directory).mkdir(parents=True, exist_ok=True)
        try:
            hook = factory(args)
        except Exception as error:  # user code: whatever it raises is the operator's to see, by name
            raise PluginError(f"{option}: {path}(args) raised {type(error).__name__}: {error}") from error
        return cls(hook, where=f"{option}: {path}", directory=directory, builder=builder)

    @property
    def num_prompts(self) -> int | None:
        """The class's length (or its dataset's, as Miles reads it); None if it has none."""
        for sized in (self._hook, getattr(self._hook, "dataset", None)):
            if isinstance(sized, Sized):
                return len(sized)
        return None

    @property
    def exhausted(self) -> bool:
        """Whether the class has returned an empty list."""
        return self._at.exhausted

    def next(self, n: int) -> list[Prompt]:
        """Prompts of the next `n` groups, fewer only at the end. DataError: the class failed."""
        prompts: list[Prompt] = []
        fruitless = 0
        while len(prompts) < n and not self.exhausted:
            wanted = n - len(prompts)
            groups = self._groups(wanted)
            kept = [prompt for group in groups if (prompt := self._prompt(group)) is not None]
            fruitless = 0 if kept else fruitless + 1
            if fruitless == MAX_FRUITLESS_CALLS:
                raise DataError(
                    f"{self._where}: {fruitless} calls of get_samples in a row gave only prompts over "
                    f"rollout_max_prompt_len = {self._builder.spec.rollout_max_prompt_len} tokens; "
                    "raise the limit."
                )
            prompts += kept
            self._at = msgspec.structs.replace(
                self._at,
                yielded=self._at.yielded + len(kept),
                filtered=self._at.filtered + len(groups) - len(kept),
                exhausted=not groups,
            )
        return prompts

    def cursor(self) -> bytes:
        """Has the class save itself (unless nothing changed since it last did) and returns where.

        A crash may come before the cursor is committed, so every save has its own rollout_id and none is
        removed.
        """
        if self._at != self._saved:
            rollout_id = self._at.rollout_id + 1
            before = self._files()
            self._call("save", rollout_id)
            after = self._files()
            written = sorted(name for name, state in after.items() if before.get(name) != state)
            self._at = msgspec.structs.replace(self._at, rollout_id=rollout_id, files=written)
            self._saved = self._at
        return msgspec.json.encode(self._at)

    def restore(self, cursor: bytes) -> None:
        """Has the class load what it saved for `cursor`. DataError: the files are gone, or it fails."""
        try:
            position = msgspec.json.decode(cursor, type=_Position)
        except msgspec.DecodeError as error:
            raise DataError(f"{self._where}: the cursor is not of a data source class: {error}") from error
        # slime's own class begins anew, silently, when its file is not there.
        missing = [name for name in position.files if not (self._directory / name).is_file()]
        if missing:
            raise DataError(
                f"{self._where}: {self._directory} has lost {', '.join(missing)}, which "
                f"save({position.rollout_id}) wrote; put the directory back, or start a new run."
            )
        if position.rollout_id >= 0:
            self._call("load", position.rollout_id)
        self._at = self._saved = position

    def statistics(self) -> SourceStatistics:
        """Counts so far; epochs are the class's own affair and read 0."""
        return SourceStatistics(yielded=self._at.yielded, filtered=self._at.filtered, bad=0, epoch=0)

    def _groups(self, n: int) -> list[Any]:
        groups = self._call("get_samples", n)
        if not isinstance(groups, list):
            raise self._wrong(n, f"a {type(groups).__name__}, not a list of groups")
        if len(groups) > n:
            raise self._wrong(n, f"{len(groups)} groups, more than it was asked for")
        for i, group in enumerate(groups):
            if not isinstance(group, list) or not group:
                what = "an empty list" if group == [] else f"a {type(group).__name__}"
                raise self._wrong(n, f"{what} as group {i}; a group is a list of samples")
            if any(not hasattr(sample, "prompt") for sample in group):
                raise self._wrong(n, f"a sample without prompt in group {i}")
            if any(getattr(sample, "response_length", 0) for sample in group):
                raise self._wrong(n, f"a sample with a response in group {i}; only fresh samples are taken")
            if any(sample.prompt != group[0].prompt for sample in group):
                raise self._wrong(n, f"samples of different prompts in group {i}; a group shares its prompt")
        return groups

    def _prompt(self, group: list[Any]) -> Prompt | None:
        sample = group[0]
        try:
            return self._builder.build_from_hook(
                sample.prompt,
                label=getattr(sample, "label", None),
                metadata=getattr(sample, "metadata", None),
                tokens=getattr(sample, "tokens", None),
            )
        except LineError as error:
            raise DataError(
                f"{self._where}: get_samples returned a sample that is no prompt: {error}"
            ) from error

    def _wrong(self, n: int, what: str) -> DataError:
        return DataError(f"{self._where}: get_samples({n}) returned {what}.")

    def _call(self, method: str, argument: int) -> Any:
        try:
            return getattr(self._hook, method)(argument)
        except Exception as error:  # user code: whatever it raises is the operator's to see, by name
            raise DataError(
                f"{self._where}: {method}({argument}) raised {type(error).__name__}: {error}"
            ) from error

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file in the directory."""
        files = (path for path in self._directory.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self._directory)): (stat.st_size, stat.st_mtime_ns)
            for path in files
            for stat in (path.stat(),)
        }
