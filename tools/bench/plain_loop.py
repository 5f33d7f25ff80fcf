"""The rival: one process that generates, scores, trains and evaluates in turn. Strictly on-policy.

    python -m tools.bench.plain_loop --topology FILE --out FILE.json [--threads N] [--num-rollout N]

The same model, prompts, batch sizes, learning rate and loss as the topology's job: its source, its embedded
engine with a whole batch in flight, its built-in reward, its torch backend, called one after the other. No
link, no records, no checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.data.open import eval_sets, open_source
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.engines import session
from asyncrl.engines.base import OnNewWeights
from asyncrl.engines.embedded import Embedded
from asyncrl.engines.make import context_len
from asyncrl.messages.sample import Lane, Prompt, Sample, Score, Segment, assemble
from asyncrl.topology.load import load
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.train.backend import train_plan
from asyncrl.train.evaluate import score
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend


class Loop:
    """Everything the loop holds."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.source = open_source(plan, Path())
        self.eval_prompts = [prompt for known in eval_sets(plan) for prompt in known.prompts()]
        self.trainer = Trainer(make_backend(train_plan(plan.topology)))
        self._next_group = 0
        model = plan.topology.trainer.hf_checkpoint
        tokenizer = Tokenizer.load(model)
        skip = plan.topology.rollout.rollout_skip_special_tokens
        self.engine = Embedded(
            model,
            max_concurrency=max(plan.samples_per_rollout, len(self.eval_prompts)),
            max_context_len=context_len(plan),
            tokenizer_decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=skip),
            num_threads=plan.topology.trainer.num_threads,
        )

    async def start(self) -> None:
        """Load the model on both sides."""
        self.trainer.start()
        await self.engine.start()

    async def step(self) -> None:
        """One rollout step: generate, score, train, swap the weights."""
        rollout = self.plan.topology.rollout
        prompts = self.source.next(rollout.rollout_batch_size)
        groups = await self.answers(prompts, per_prompt=rollout.n_samples_per_prompt, lane=Lane.TRAIN)
        await self._score([sample for group in groups for sample in group])
        batch = self.trainer.rollout_step
        self.trainer.train_batch(batch, groups)
        weights = self.trainer.backend.weights()
        await self.engine.load_weights(batch + 1, 1, weights, OnNewWeights.FINISH)

    async def accuracy(self) -> float:
        """Mean reward over the held-out prompts."""
        count = self.plan.topology.eval.n_samples_per_eval_prompt
        groups = await self.answers(self.eval_prompts, per_prompt=count, lane=Lane.EVAL)
        rewards = await self._score([sample for group in groups for sample in group])
        return sum(rewards) / len(rewards)

    async def answers(self, prompts: list[Prompt], *, per_prompt: int, lane: Lane) -> list[list[Sample]]:
        """Groups of finished samples, all generated at once."""
        groups = []
        for prompt in prompts:
            group_id = self._next_group
            self._next_group += 1
            groups.append(
                [Sample(group_id=group_id, index=i, prompt=prompt, lane=lane) for i in range(per_prompt)]
            )
        done = await asyncio.gather(*(self._answer(sample) for group in groups for sample in group))
        finished = iter(done)
        return [[next(finished) for _ in group] for group in groups]

    async def _answer(self, sample: Sample) -> Sample:
        request = session.request_for(self.plan, sample, uid=f"{sample.group_id}.{sample.index}")
        segments: list[Segment] = []
        status = sample.status
        async for segment, status in session.generate(self.engine, request):  # noqa: B007 - the last one counts
            segments.append(segment)
        return assemble(
            group_id=sample.group_id, index=sample.index, prompt=sample.prompt, segments=segments,
            status=status, lane=sample.lane,
        )  # fmt: skip

    async def _score(self, samples: list[Sample]) -> list[float]:
        table = self.plan.topology.reward[0]
        rewards = await score(samples, reward=table.use, reward_key=table.reward_key)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.score = Score(reward=reward)
        return rewards


async def run(plan: Plan) -> dict[str, Any]:
    """All rollout steps with their evaluations; Unix times and figures."""
    loop = Loop(plan)
    await loop.start()
    num_rollout, interval = plan.num_rollout or 0, plan.topology.eval.eval_interval
    evaluations: list[tuple[float, float]] = []
    ended: list[float] = []
    for step in range(num_rollout + 1):
        if loop.eval_prompts and (step in {0, num_rollout} or (interval and step % interval == 0)):
            evaluations.append((await loop.accuracy(), time.time()))
        if step < num_rollout:
            await loop.step()
            ended.append(time.time())
    await loop.engine.close()
    return {
        "accuracies": [[when, value] for value, when in evaluations],
        "ended": ended,
        "samples_per_rollout": plan.samples_per_rollout,
    }


def make_plan(options: argparse.Namespace) -> Plan:
    """The topology's plan, with this process's threads and steps."""
    topology = load(options.topology, options.overrides)
    trainer = msgspec.structs.replace(topology.trainer, num_threads=options.threads)
    topology = msgspec.structs.replace(topology, trainer=trainer)
    if options.num_rollout is not None:
        run_table = msgspec.structs.replace(topology.run, num_rollout=options.num_rollout)
        topology = msgspec.structs.replace(topology, run=run_table)
    return compile_plan(topology, source=str(options.topology))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--num-rollout", type=int, default=None, help="instead of the topology's")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main() -> None:
    """Run, and write what was found as JSON."""
    options = arguments().parse_args()
    result = asyncio.run(run(make_plan(options)))
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
