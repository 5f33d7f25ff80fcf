"""What a counterfactual replay does to recorded groups before they are trained: new rewards, another order.

`Rescorer` asks a reward of the user's, in the same killable children as a live run, about samples that were
recorded with another one. Invariant: a sample that it gives no reward ends the replay by name; none is left
out and none counts as zero. Recorded samples are never changed: new ones are made.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.sample import Sample, Score
from asyncrl.rewards.base import RewardFailure, RewardSpec
from asyncrl.rewards.sandbox import Sandbox
from asyncrl.topology.flat import flat_options
from asyncrl.topology.schema import RewardConfig, Topology

Groups = list[list[Sample]]


class Rewards(NamedTuple):
    """The rewards of one batch, recorded or new."""

    mean: float
    std: float
    """Of the samples' rewards (population)."""
    no_spread: float
    """Share of groups whose rewards are all equal: group-relative advantages of 0."""


def rewards_of(groups: Sequence[Sequence[Sample]]) -> Rewards:
    """The figures of scored groups."""
    values = [[sample.score.reward for sample in group if sample.score] for group in groups]
    flat = [value for group in values for value in group]
    equal = [min(group) == max(group) for group in values if group]
    return Rewards(statistics.fmean(flat), statistics.pstdev(flat), statistics.fmean(equal))


def num_changed(old: Sequence[Sequence[Sample]], new: Sequence[Sequence[Sample]]) -> int:
    """Samples whose reward is another one."""
    pairs = zip((s for group in old for s in group), (s for group in new for s in group), strict=True)
    return sum(a.score is None or b.score is None or a.score.reward != b.score.reward for a, b in pairs)


def shuffled(groups: Groups, *, seed: int, batch: int) -> Groups:
    """The groups of a batch in another order, which depends on the seed and the batch's number alone.

    Groups stay whole, and batches stay what they are and in their order: a batch is what one version of the
    weights was trained on, and to mix batches would change how old its tokens are. With several optimizer
    steps per rollout step a group may come to another one of them.
    """
    order = list(groups)
    random.Random(f"{seed}:{batch}").shuffle(order)
    return order


class Rescorer:
    """A reward over recorded samples; `start`, any number of `score`, `close`."""

    def __init__(self, use: str, *, topology: Topology) -> None:
        """`use` is what [[reward]] use takes; its other options are those of the topology's first table."""
        tables = topology.reward
        table = tables[0] if tables else RewardConfig()
        self._use = use
        self._group_rm = table.group_rm
        spec = RewardSpec(
            use=use,
            rm_url=table.rm_url,
            reward_key=table.reward_key,
            group_rm=table.group_rm,
            custom_config_path=topology.run.custom_config_path,
            options=flat_options(topology, reward=0 if tables else None),
            search_paths=["."],
        )
        self._sandbox = Sandbox(
            spec, timeout_s=table.timeout_s, concurrency=table.concurrency, name="rescore"
        )
        self._runner = asyncio.Runner()
        self._closed = False

    def start(self) -> None:
        """Load the reward. Raises ConfigError (PluginError), RewardError."""
        self._runner.run(self._sandbox.start())

    def score(self, groups: Groups) -> Groups:
        """The same samples with new scores. Raises RewardError that names the samples without one."""
        return self._runner.run(self._score(groups))

    def close(self) -> None:
        """Kill the children. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._sandbox.close())
        finally:
            self._runner.close()

    async def _score(self, groups: Groups) -> Groups:
        fresh = [[as_generated(sample) for sample in group] for group in groups]
        if self._group_rm:
            results = await asyncio.gather(*(self._sandbox.score_group(group) for group in fresh))
        else:
            flat = iter(await self._sandbox.score([sample for group in fresh for sample in group]))
            results = [[next(flat) for _ in group] for group in fresh]
        failures = [one for group in results for one in group if isinstance(one, RewardFailure)]
        if failures:
            total = sum(map(len, groups))
            raise RewardError(
                f"--rescore {self._use}: {len(failures)} of {total} samples got no reward; the first:"
                f" {failures[0].kind}: {failures[0].message}\n{failures[0].traceback}".rstrip()
            )
        return [
            [_with(old, sample, score) for old, sample, score in zip(*three, strict=True)]
            for three in zip(groups, fresh, results, strict=True)
        ]


def as_generated(sample: Sample) -> Sample:
    """The sample as the recorded reward saw it: without its score and the metadata it added."""
    added = sample.score.metadata if sample.score is not None else {}
    kept = {key: value for key, value in sample.metadata.items() if key not in added}
    before = {key: sample.prompt.metadata[key] for key in added if key in sample.prompt.metadata}
    return msgspec.structs.replace(sample, score=None, metadata=kept | before)


def _with(old: Sample, fresh: Sample, score: Score | RewardFailure) -> Sample:
    """What was out of the loss stays out (a filter's verdict), and a teacher's log-probs stay."""
    assert isinstance(score, Score), "failures were raised before"
    recorded = old.score or Score()
    score = msgspec.structs.replace(
        score,
        remove_sample=score.remove_sample or recorded.remove_sample,
        teacher_logprobs=score.teacher_logprobs or recorded.teacher_logprobs,
    )
    return msgspec.structs.replace(fresh, score=score, metadata=fresh.metadata | score.metadata)
