"""Where prompts come from: the `PromptSource` protocol, a JSONL file, an evaluation set.

A source owns a position and nothing else: it opens no socket and writes no ledger. Its `cursor()` is
committed by the buffer in the same transaction as the prompts it goes with, and `restore()` of it continues
exactly there. All methods block (files, tokenising, user code): call them outside an event loop, from one
thread at a time. An empty list from `next` means the end of the data; a failure is always a DataError, never
an end. A class of the user's is in `hook_source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.data.jsonl import JsonlIndex, LineError, OnBadLine, split_slice
from asyncrl.data.prompts import PromptBuilder, PromptSpec
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.sample import Prompt


class SourceStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a source did so far, over all lives of the run."""

    yielded: int
    """Prompts handed out."""
    filtered: int
    """Rows left out because of `rollout_max_prompt_len`, each counted once."""
    bad: int
    """Lines left out because they are no usable row, each counted once."""
    epoch: int
    """0-based epoch of the next prompt."""


class PromptSource(Protocol):
    """What the source role needs."""

    @property
    def num_prompts(self) -> int | None:
        """Prompts in an epoch, before the length filter; None where that is unknown."""

    @property
    def exhausted(self) -> bool:
        """True once `next` can only return an empty list."""

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts, fewer only at the end of the data. DataError: the data is unusable."""

    def cursor(self) -> bytes:
        """The position after everything `next` returned."""

    def restore(self, cursor: bytes) -> None:
        """Continues after `cursor`. DataError: it is not from this data and these settings."""

    def statistics(self) -> SourceStatistics:
        """Counts so far."""


class _Position(msgspec.Struct, frozen=True, kw_only=True):
    """Where a JsonlSource stands; its encoding is the cursor."""

    fingerprint: str
    """Of the rows."""
    rollout_seed: int | None
    """None: not shuffled."""
    epoch: int = 0
    row: int = 0
    """Place in the epoch's order of the next row to look at."""
    yielded: int = 0
    filtered: int = 0
    bad: int = 0
    """Rows without a prompt (their template refused them); bad lines of the scan are not in it."""


class JsonlSource:
    """Prompts of a JSONL file, epoch after epoch; `rollout_seed` and the epoch alone fix each one's order."""

    def __init__(
        self,
        index: JsonlIndex,
        *,
        builder: PromptBuilder,
        rollout_shuffle: bool = False,
        rollout_seed: int = 42,
        num_epoch: int | None = None,
        on_bad_line: OnBadLine = "fail",
    ) -> None:
        """`num_epoch` None: for ever. `index` must have been built with `builder.problem` as its check."""
        self._index = index
        self._builder = builder
        self._num_epoch = num_epoch
        self._on_bad_line = on_bad_line
        self._at = _Position(
            fingerprint=index.fingerprint, rollout_seed=rollout_seed if rollout_shuffle else None
        )
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        tokenizer: Tokenizer,
        spec: PromptSpec,
        rollout_shuffle: bool = False,
        rollout_seed: int = 42,
        num_epoch: int | None = None,
        on_bad_line: OnBadLine = "fail",
        dataset: str = "",
        option: str = "prompt_data",
    ) -> JsonlSource:
        """Scans `path` and starts at its beginning. DataError (naming `option`) as `JsonlIndex.build`."""
        builder = PromptBuilder(tokenizer, spec=spec, dataset=dataset, option=option)
        index = JsonlIndex.build(path, on_bad_line=on_bad_line, check=builder.problem, option=option)
        return cls(
            index,
            builder=builder,
            rollout_shuffle=rollout_shuffle,
            rollout_seed=rollout_seed,
            num_epoch=num_epoch,
            on_bad_line=on_bad_line,
        )

    @property
    def num_prompts(self) -> int:
        """Usable rows of the file; the length filter is applied later, when a row is reached."""
        return len(self._index)

    @property
    def exhausted(self) -> bool:
        """Whether all epochs are over. Never with `num_epoch` None."""
        return self._num_epoch is not None and self._at.epoch >= self._num_epoch

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts, fewer only at the end of the last epoch. DataError: no row gives a prompt."""
        prompts: list[Prompt] = []
        while len(prompts) < n and not self.exhausted:
            prompt = self._step()
            if prompt is not None:
                prompts.append(prompt)
        return prompts

    def cursor(self) -> bytes:
        """The position, as JSON."""
        return msgspec.json.encode(self._at)

    def restore(self, cursor: bytes) -> None:
        """Continues after `cursor`. DataError: other rows, or another shuffle or seed."""
        try:
            position = msgspec.json.decode(cursor, type=_Position)
        except msgspec.DecodeError as error:
            raise DataError(f"{self._index.path}: the cursor is not of a JSONL source: {error}") from error
        if position.fingerprint != self._at.fingerprint:
            raise DataError(
                f"{self._index.path}: its rows are not the ones that this run began with; put the old file "
                "(and the old keys and on_bad_line) back, or start a new run."
            )
        if position.rollout_seed != self._at.rollout_seed:
            raise DataError(
                f"{self._index.path}: this run began with {_seed(position)}, now {_seed(self._at)} is given; "
                "a run keeps its order of prompts. Set it back, or start a new run."
            )
        self._at = position

    def statistics(self) -> SourceStatistics:
        """Counts so far; `bad` includes the lines that the scan left out."""
        at = self._at
        bad = at.bad + self._index.num_bad
        return SourceStatistics(yielded=at.yielded, filtered=at.filtered, bad=bad, epoch=at.epoch)

    def _step(self) -> Prompt | None:
        """Looks at one row and moves on; an error leaves the position where it was."""
        at = self._at
        i = int(self._epoch_order(at.epoch)[at.row])
        first = int(at.epoch == 0)  # every later epoch meets the same rows again
        try:
            prompt = self._builder.build(self._index.row(i))
            changes = {"yielded": at.yielded + 1} if prompt else {"filtered": at.filtered + first}
        except LineError as error:
            if self._on_bad_line == "fail":
                raise DataError(f"{self._index.path}, line {self._index.line_number(i)}: {error}") from error
            prompt, changes = None, {"bad": at.bad + first}
        at = msgspec.structs.replace(at, row=at.row + 1, **changes)
        if at.row == len(self._index):
            at = msgspec.structs.replace(at, epoch=at.epoch + 1, row=0)
            self._require_prompts(at)
        self._at = at
        return prompt

    def _require_prompts(self, at: _Position) -> None:
        if at.yielded == 0:
            raise DataError(
                f"{self._index.path}: none of its {len(self._index)} rows gives a prompt: {at.filtered} have "
                f"more than rollout_max_prompt_len = {self._builder.spec.rollout_max_prompt_len} tokens, "
                f"{at.bad} are refused by the chat template. Raise the limit, or correct the data."
            )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._index), seed=self._at.rollout_seed, epoch=epoch))
        return self._order[1]


def epoch_order(num_rows: int, *, seed: int | None, epoch: int) -> NDArray[np.int64]:
    """Row numbers [N] in the order of `epoch`, a pure function of the arguments; file order without `seed`.

    Not slime's order (`random.seed(seed + epoch)`): there, epoch 1 of a seed is epoch 0 of the next.
    """
    if seed is None:
        return np.arange(num_rows, dtype=np.int64)
    # Sorting raw generator output: numpy guarantees that stream for ever, but not `Generator.permutation`.
    keys = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_rows)
    return np.argsort(keys, kind="stable").astype(np.int64)


class EvalSet:
    """An evaluation set: the same prompts in file order, at every evaluation."""

    def __init__(
        self,
        name: str,
        *,
        path: str | Path,
        tokenizer: Tokenizer,
        spec: PromptSpec,
        on_bad_line: OnBadLine = "fail",
    ) -> None:
        """Scans `path`; `name` goes into every prompt's `dataset`. DataError as `JsonlIndex.build`."""
        self.name = name
        self._on_bad_line = on_bad_line
        option = f"eval_prompt_data ({name})"
        self._builder = PromptBuilder(tokenizer, spec=spec, dataset=name, option=option)
        self._index = JsonlIndex.build(
            path, on_bad_line=on_bad_line, check=self._builder.problem, option=option
        )

    @property
    def num_prompts(self) -> int:
        """Usable rows, before the length filter."""
        return len(self._index)

    def source(self) -> JsonlSource:
        """A new source that yields every prompt once."""
        return JsonlSource(self._index, builder=self._builder, num_epoch=1, on_bad_line=self._on_bad_line)

    def prompts(self) -> Iterator[Prompt]:
        """Every prompt once, in file order, read as it is asked for."""
        source = self.source()
        while prompts := source.next(1):
            yield from prompts


def parse_eval_prompt_data(values: list[str]) -> list[tuple[str, str]]:
    """(name, path) pairs from `[name, path, name, path, ...]`; one value alone is a path, named by its stem.

    (The references call a lone value "aime", whatever it is.) ConfigError: an odd number, a name twice.
    """
    if len(values) == 1:
        return [(split_slice(values[0])[0].stem, values[0])]
    problems = []
    if len(values) % 2:
        problems.append(
            f"eval_prompt_data: {len(values)} values, but names and paths come in pairs: "
            '["aime", "/data/aime.jsonl", "math", "/data/math.jsonl"]; a single path may stand alone.'
        )
    pairs = list(zip(values[::2], values[1::2], strict=False))
    names = [name for name, _ in pairs]
    problems += [
        f'eval_prompt_data: the name "{name}" is given {names.count(name)} times; names must differ.'
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(*problems)
    return pairs


def _seed(position: _Position) -> str:
    if position.rollout_seed is None:
        return "rollout_shuffle = false"
    return f"rollout_shuffle = true, rollout_seed = {position.rollout_seed}"
