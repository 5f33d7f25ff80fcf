"""Whether the values of a topology make sense, alone (ranges) and together; every problem at once.

Pure: no file is opened, no plug-in imported, no name resolved. Each problem is one line that starts with the
option it is about and says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from asyncrl.messages.codec import SizeLimits
from asyncrl.topology import batch, catalogue, checks_algorithm, checks_rewards, checks_trainer
from asyncrl.topology.plugins import BOXED, check_reward_name
from asyncrl.topology.progress import hand_ins
from asyncrl.topology.ranges import RANGES, Range
from asyncrl.topology.schema import GeneratorConfig, RewardConfig, Topology

ENGINES = ("embedded", "scripted")
"""What `generator.engine` may name."""
RESERVED = ("source", "buffer", "trainer", "supervisor", "evaluator")
"""Names that belong to the processes of which there is one."""

MAX_BODIES = SizeLimits().max_frames
"""Bodies of one message; a group is delivered in one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*%?")


def problems(topology: Topology) -> list[str]:
    """Every reason why this topology cannot run; empty when it can."""
    found: list[str] = []
    for check in (
        _ranges,
        _names,
        _addresses,
        _schedule,
        _batch,
        _data,
        _lengths,
        _pieces,
        checks_algorithm.problems,
        checks_trainer.problems,
        _rewards,
        checks_rewards.problems,
        _rest,
    ):
        found.extend(check(topology))
    return found


def where(table: str, record: GeneratorConfig | RewardConfig) -> str:
    """How a message calls one of several tables."""
    return f'{table} "{record.name}"'


def is_private(address: str) -> bool:
    """Whether only this host can reach an address: ipc, or tcp on loopback."""
    if address.startswith(("ipc://", "inproc://")):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ranges(topology: Topology) -> Iterator[str]:
    for table in catalogue.tables().values():
        records = getattr(topology, table.name)
        for record in records if table.is_array else [records]:
            name = where(table.name, record) if table.is_array else table.name
            for key in table.options:
                yield from _range(RANGES.get(f"{table.name}.{key}"), f"{name}.{key}", getattr(record, key))


def _range(allowed: Range | None, name: str, value: Any) -> Iterator[str]:
    if allowed is not None and value is not None and value not in allowed:
        yield f"{name}: given {value}; allowed: {allowed}"


def _names(topology: Topology) -> Iterator[str]:
    if not _RUN_NAME.fullmatch(topology.run.name):
        yield f'run.name: given "{topology.run.name}"; allowed: letters, digits, ".", "_", "-", last "%"'
    seen: set[str] = set()
    tables = [("generator", table) for table in topology.generator]
    for kind, table in tables + [("reward", table) for table in topology.reward]:
        place = f"{where(kind, table)}.name"
        if not _NAME.fullmatch(table.name):
            yield f'{place}: allowed: letters, digits, ".", "_" and "-", starting with a letter or a digit'
        if table.name in RESERVED:
            yield f"{place}: reserved; allowed: any name but {', '.join(RESERVED)}"
        for name in process_names(table):
            if name in seen:
                yield f'{place}: a second process would be called "{name}"; give every table its own name'
                break
        seen.update(process_names(table))


def process_names(table: GeneratorConfig | RewardConfig) -> list[str]:
    """The processes a table stands for: NAME, or NAME-0, NAME-1, ... with replicas."""
    if table.replicas <= 1:
        return [table.name]
    return [f"{table.name}-{number}" for number in range(table.replicas)]


def _addresses(topology: Topology) -> Iterator[str]:
    for key in ("address", "buffer_address", "publisher_address"):
        address = getattr(topology.run, key)
        if not address and key != "address":
            continue
        if not _is_address(address):
            yield f'run.{key}: given "{address}"; allowed: "tcp://HOST:PORT" or "ipc://PATH"'
        elif topology.run.key is None and not is_private(address):
            yield (
                f'run.{key}: other hosts can reach "{address}", and run.key is not set; make a key with '
                f'`asyncrl keys` and set run.key to its file, or listen on "tcp://127.0.0.1:0"'
            )


def _is_address(address: str) -> bool:
    if address.startswith("ipc://"):
        return len(address) > len("ipc://")
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    is_port = port.isdecimal() and int(port) <= 65535
    return address.startswith("tcp://") and bool(host) and bool(colon) and is_port


def _schedule(topology: Topology) -> Iterator[str]:
    rollout = topology.rollout
    size, interval, eta = rollout.rollout_batch_size, rollout.update_weights_interval, rollout.max_staleness
    if eta + 1 < interval:
        yield (
            f"rollout.max_staleness: tickets cannot feed the trainer: (max_staleness + 1) x B = "
            f"({eta} + 1) x {size} = {(eta + 1) * size} < update_weights_interval x B = {interval} x {size} "
            f"= {interval * size}; set max_staleness to at least {interval - 1}, or update_weights_interval "
            f"to at most {eta + 1}"
        )
    over = rollout.over_sampling_batch_size
    if over is None:
        return
    if rollout.on_straggler != "drop":
        yield (
            f"rollout.over_sampling_batch_size: surplus groups are dropped, never trained late, so it needs "
            f'on_straggler = "drop"; given on_straggler = "{rollout.on_straggler}"'
        )
    if over < size:
        yield f"rollout.over_sampling_batch_size: given {over}; allowed: at least rollout_batch_size = {size}"


def _batch(topology: Topology) -> Iterator[str]:
    trainer = topology.trainer
    solved = batch.solve(topology)
    if isinstance(solved, str):
        yield solved
    elif not trainer.use_dynamic_batch_size and solved.global_batch_size % max(1, trainer.micro_batch_size):
        yield (
            f"trainer.micro_batch_size: given {trainer.micro_batch_size}; allowed: a divisor of "
            f"global_batch_size = {solved.global_batch_size}, or use_dynamic_batch_size = true"
        )


def _data(topology: Topology) -> Iterator[str]:
    source, evals = topology.source, topology.eval
    if source.prompt_data is None and source.data_source_path is None:
        yield "source.prompt_data: required, and not given; name a JSONL file (or set data_source_path)"
    if topology.run.num_rollout is None and source.num_epoch is None:
        yield "run.num_rollout: neither run.num_rollout nor source.num_epoch is given; set one of them"
    pairs = evals.eval_prompt_data
    if len(pairs) > 1 and len(pairs) % 2:
        yield f"eval.eval_prompt_data: given {len(pairs)} strings; allowed: one path, or name and path pairs"
    names = pairs[::2]
    if len(pairs) > 1 and len(set(names)) < len(names):
        yield f"eval.eval_prompt_data: given the names {', '.join(names)}; every data set needs its own"
    for key in ("eval_interval", "min_final_accuracy"):
        if getattr(evals, key) is not None and not pairs:
            yield f"eval.{key}: given, but there is nothing to evaluate on; set eval.eval_prompt_data"
    if pairs and not topology.reward:
        yield "eval.eval_prompt_data: evaluation needs a reward; add a [[reward]] table"


def _lengths(topology: Topology) -> Iterator[str]:
    rollout, context = topology.rollout, topology.rollout.rollout_max_context_len
    if rollout.rollout_min_new_tokens > rollout.rollout_max_response_len:
        yield (
            f"rollout.rollout_min_new_tokens: given {rollout.rollout_min_new_tokens}; allowed: at most "
            f"rollout_max_response_len = {rollout.rollout_max_response_len}"
        )
    if context is None:
        return
    lengths = [("rollout.rollout_max_response_len", rollout.rollout_max_response_len)]
    lengths.append(("eval.eval_max_response_len", topology.eval.eval_max_response_len or 0))
    prompt = topology.source.rollout_max_prompt_len or 1
    for name, length in lengths:
        if prompt + length > context:
            yield (
                f"{name}: a prompt of up to {prompt} and an answer of up to {length} tokens cannot fit "
                f"rollout_max_context_len = {context}; allowed: at most {max(0, context - prompt)}"
            )


def _pieces(topology: Topology) -> Iterator[str]:
    """A group has to fit one message, and every hand-in of progress is a body of its own."""
    rollout = topology.rollout
    samples, length = rollout.n_samples_per_prompt, rollout.rollout_max_response_len
    pieces = samples * (-(-length // max(1, hand_ins(rollout).tokens)) + 1)
    if pieces >= MAX_BODIES:
        yield (
            f"rollout.progress_every_tokens: given {rollout.progress_every_tokens}: a group of {samples} "
            f"answers of up to {length} tokens comes in {pieces} pieces; allowed: fewer than {MAX_BODIES}; "
            "make it larger"
        )


def _rewards(topology: Topology) -> Iterator[str]:
    for reward in topology.reward:
        place = where("reward", reward)
        yield from check_reward_name(reward.use, option=f"{place}.use")
        if reward.use.removeprefix(BOXED) == "remote_rm" and not reward.rm_url:
            yield f'{place}.rm_url: required by use = "remote_rm", and not given; set it to its URL'


def _rest(topology: Topology) -> Iterator[str]:
    run = topology.run
    for generator in topology.generator:
        if generator.engine not in ENGINES:
            yield (
                f'{where("generator", generator)}.engine: unknown engine "{generator.engine}"; known: '
                f"{', '.join(ENGINES)} (sglang comes later)"
            )
    if run.dead_after_s <= run.heartbeat_s:
        yield (
            f"run.dead_after_s: given {run.dead_after_s:g}; allowed: above heartbeat_s = {run.heartbeat_s:g}"
        )
