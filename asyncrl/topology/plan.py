"""What a topology compiles to: everything a process needs to know, resolved, and nothing to decide later.

A plan is plain frozen data that msgspec writes to `plan.json` and reads back. Compiling is pure: no file is
opened. `words` says in sentences what a plan means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.topology import batch, checks
from asyncrl.topology.schema import EvalConfig, GeneratorConfig, RewardConfig, Topology

DEFAULT_MAX_TOKENS = 8192
"""What `trainer.max_tokens_per_gpu` is when a topology leaves it out."""
REFUSED_BATCHES = 10
"""`rollout.max_refused_per_step`, in batches, when a topology leaves it out."""


LEAD = 4
"""A generator asks for 1/LEAD of its concurrency ahead, so that a free slot needs no round trip."""


class ProcessPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One process to start."""

    name: str
    """Unique in the run; names its log, its link identity and its row in `status`."""
    role: str
    """buffer, source, trainer, reward or generator."""
    roles: list[str]
    """What runs in the process: the role, and "evaluator" beside the source where there is [eval] data."""
    index: int | None = None
    """Position of its table among the [[reward]] or [[generator]] tables; None where there is one table."""
    env: dict[str, str] = {}
    """Environment variables it is started with."""


class Credit(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be under way on one hop."""

    hop: str
    samples: int
    """0: bounded by bytes alone."""
    max_bytes: int


class EvalSet(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out data set."""

    name: str
    path: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled topology."""

    topology: Topology
    """Resolved: the four knobs, eval_* and eps_clip_high hold their values, not None."""
    processes: list[ProcessPlan]
    """In the order in which they start."""
    tickets: int
    """Groups of the lane train that may be outstanding."""
    credits: list[Credit]
    max_concurrency: int
    """Samples that all generators together have in work at most."""
    eval_sets: list[EvalSet] = []

    @property
    def num_rollout(self) -> int | None:
        """Rollout steps to train; None until the prompts are counted (`with_prompts`)."""
        return self.topology.run.num_rollout

    @property
    def num_steps_per_rollout(self) -> int:
        """Optimizer steps per rollout step."""
        return self.topology.trainer.num_steps_per_rollout or 1

    @property
    def samples_per_rollout(self) -> int:
        """Samples of one batch."""
        return self.topology.rollout.rollout_batch_size * self.topology.rollout.n_samples_per_prompt


def compile_plan(topology: Topology, *, source: str | None = None) -> Plan:
    """The plan of a topology; `source` names its file in messages.

    Raises:
        ConfigError: values out of range or at odds with each other; one line for every problem.
    """
    problems = checks.problems(topology)
    if problems:
        raise ConfigError(*(f"{source}: {problem}" if source else problem for problem in problems))
    resolved = resolve(topology)
    return Plan(
        topology=resolved,
        processes=_processes(resolved),
        tickets=_tickets(resolved),
        credits=_credits(resolved),
        max_concurrency=sum(table.replicas * table.concurrency for table in resolved.generator),
        eval_sets=_eval_sets(resolved.eval),
    )


def with_prompts(plan: Plan, num_prompts: int) -> Plan:
    """The plan with `num_rollout` computed from the data, where the topology gives only `num_epoch`.

    (num_epoch * num_prompts) // rollout_batch_size, rounded up with allow_partial_train_step.

    Raises:
        ConfigError: the prompts do not fill a single rollout step.
    """
    run, num_epoch = plan.topology.run, plan.topology.source.num_epoch
    if run.num_rollout is not None or num_epoch is None:
        return plan
    size = plan.topology.rollout.rollout_batch_size
    partial = size - 1 if plan.topology.trainer.allow_partial_train_step else 0
    num_rollout = (num_epoch * num_prompts + partial) // size
    if num_rollout < 1:
        raise ConfigError(
            f"source.num_epoch: {num_epoch} x {num_prompts} prompts do not fill one rollout step of "
            f"rollout_batch_size = {size}; raise num_epoch, lower rollout_batch_size, or add prompts"
        )
    counted = msgspec.structs.replace(run, num_rollout=num_rollout)
    return msgspec.structs.replace(plan, topology=msgspec.structs.replace(plan.topology, run=counted))


def resolve(topology: Topology) -> Topology:
    """The topology with every value filled in that follows from another one; it must be free of problems."""
    knobs = batch.solve(topology)
    assert not isinstance(knobs, str), knobs
    rollout, trainer, algorithm = topology.rollout, topology.trainer, topology.algorithm
    size = rollout.over_sampling_batch_size or rollout.rollout_batch_size
    # A number of steps that was asked for decides, not the epochs: the data repeat.
    num_epoch = None if topology.run.num_rollout is not None else topology.source.num_epoch
    return msgspec.structs.replace(
        topology,
        source=msgspec.structs.replace(topology.source, num_epoch=num_epoch),
        rollout=msgspec.structs.replace(
            rollout, max_refused_per_step=rollout.max_refused_per_step or REFUSED_BATCHES * size
        ),
        trainer=msgspec.structs.replace(
            trainer,
            global_batch_size=knobs.global_batch_size,
            num_steps_per_rollout=knobs.num_steps_per_rollout,
            max_tokens_per_gpu=trainer.max_tokens_per_gpu or DEFAULT_MAX_TOKENS,
            ref_load=trainer.ref_load or trainer.hf_checkpoint,
        ),
        algorithm=msgspec.structs.replace(
            algorithm,
            eps_clip_high=algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high,
        ),
        eval=_inherited(topology),
        reward=[_eval_key(table) for table in topology.reward],
    )


def _inherited(topology: Topology) -> EvalConfig:
    evals, rollout, source = topology.eval, topology.rollout, topology.source
    parents = {
        "eval_temperature": rollout.rollout_temperature,
        "eval_top_p": rollout.rollout_top_p,
        "eval_top_k": rollout.rollout_top_k,
        "eval_max_response_len": rollout.rollout_max_response_len,
        "eval_input_key": source.input_key,
        "eval_label_key": source.label_key,
    }
    missing = {key: value for key, value in parents.items() if getattr(evals, key) is None}
    return msgspec.structs.replace(evals, **missing)


def _eval_key(table: RewardConfig) -> RewardConfig:
    return msgspec.structs.replace(table, eval_reward_key=table.eval_reward_key or table.reward_key)


def _processes(topology: Topology) -> list[ProcessPlan]:
    has_eval = bool(topology.eval.eval_prompt_data)
    trainer_env = _threads(topology.trainer.num_threads)
    if topology.trainer.deterministic and topology.trainer.device.startswith("cuda"):
        trainer_env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is only deterministic with it
    return [
        ProcessPlan(name="buffer", role="buffer", roles=["buffer"], env=_threads(1)),
        ProcessPlan(
            name="source",
            role="source",
            roles=["source", "evaluator"] if has_eval else ["source"],
            env=_threads(1),
        ),
        ProcessPlan(name="trainer", role="trainer", roles=["trainer"], env=trainer_env),
        *_workers("reward", topology.reward),
        *_workers("generator", topology.generator),
    ]


def _workers(role: str, tables: Sequence[RewardConfig | GeneratorConfig]) -> list[ProcessPlan]:
    return [
        ProcessPlan(
            name=name,
            role=role,
            roles=[role],
            index=index,
            env=_threads(table.num_threads if isinstance(table, GeneratorConfig) else 1),
        )
        for index, table in enumerate(tables)
        for name in checks.process_names(table)
    ]


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}


def _tickets(topology: Topology) -> int:
    rollout = topology.rollout
    return (rollout.max_staleness + 1) * (rollout.over_sampling_batch_size or rollout.rollout_batch_size)


def _credits(topology: Topology) -> list[Credit]:
    rollout, window = topology.rollout, topology.buffer.window_bytes
    batch_samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    ahead = (topology.trainer.prefetch_batches + 1) * batch_samples
    return [
        Credit(
            hop="source -> buffer",
            samples=_tickets(topology) * rollout.n_samples_per_prompt,
            max_bytes=window,
        ),
        *(
            Credit(hop=f"buffer -> {name}", samples=generator_credit(table), max_bytes=table.max_bytes)
            for table in topology.generator
            for name in checks.process_names(table)
        ),
        *(
            Credit(hop=f"buffer -> {name}", samples=table.batch, max_bytes=window)
            for table in topology.reward
            for name in checks.process_names(table)
        ),
        *(
            Credit(hop=f"{name} -> buffer", samples=generator_credit(table), max_bytes=table.max_bytes)
            for table in topology.generator
            for name in checks.process_names(table)
        ),
        Credit(hop="buffer -> trainer", samples=ahead, max_bytes=window),
        Credit(hop="buffer -> evaluator", samples=0, max_bytes=window),
    ]


def generator_credit(table: GeneratorConfig) -> int:
    """Samples that a generator may hold: those in work, and some that wait for a slot."""
    return table.concurrency + table.concurrency // LEAD


def _eval_sets(evals: EvalConfig) -> list[EvalSet]:
    given = evals.eval_prompt_data
    if len(given) == 1:
        return [EvalSet(name=PurePath(given[0]).stem, path=given[0])]
    return [EvalSet(name=name, path=path) for name, path in zip(given[::2], given[1::2], strict=True)]
