"""`asyncrl check`: a compiled topology for people. Opens no socket and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncrl.topology import presets, words
from asyncrl.topology.load import load
from asyncrl.topology.plan import Plan, compile_plan


def check(file: Path, *, overrides: Sequence[str] = ()) -> None:
    """Prints processes, addresses, credits, tickets, the schedule in words and what looks wrong.

    Raises:
        ConfigError: the file cannot be used.
    """
    plan = compile_plan(load(file, overrides), source=str(file))
    show(plan, Console(highlight=False, soft_wrap=True), title=str(file))


def show(plan: Plan, console: Console, *, title: str) -> None:
    """The same for a plan that is compiled already."""
    console.print(f"{title} compiles: {len(plan.processes)} processes, {plan.tickets} tickets")
    _section(console, "processes")
    console.print(_processes(plan))
    _section(console, "addresses")
    for line in addresses(plan):
        console.print(f"  {line}", markup=False)
    _section(console, "credits")
    console.print(_credits(plan))
    _section(console, "schedule")
    for line in words.schedule_in_words(plan):
        console.print(f"  - {line}", markup=False)
    if plan.topology.algorithm.correction:
        _section(console, "correction")
        for line in expansion(plan):
            console.print(f"  {line}", markup=False)
    found = [*words.warnings(plan), *missing_files(plan)]
    _section(console, "warnings" if found else "no warnings")
    for line in found:
        console.print(f"  - {line}", markup=False)


def expansion(plan: Plan) -> list[str]:
    """What algorithm.correction stands for: the flags that the plan records, one on each line."""
    algorithm, rollout = plan.topology.algorithm, plan.topology.rollout
    flags, _ = presets.flags_of(algorithm.correction, response_length=rollout.rollout_max_response_len)
    lines = [f"algorithm.{line}" for line in presets.written(flags)]
    return [f'"{algorithm.correction}" stands for', *(f"  {line}" for line in lines or ["no flag"])]


def addresses(plan: Plan) -> list[str]:
    """Who listens where; port 0 and an empty address are chosen at launch."""
    run = plan.topology.run
    host = run.address.rpartition(":")[0]
    free = f"{host}:0" if run.address.startswith("tcp://") else "tcp://127.0.0.1:0"
    note = " (0: a free port)"
    lines = {"supervisor": run.address, "buffer": run.buffer_address, "publisher": run.publisher_address}
    return [
        f"{who:<11}{it or free}{note if (it or free).endswith(':0') else ''}" for who, it in lines.items()
    ]


def missing_files(plan: Plan) -> Iterator[str]:
    """Files that the topology names and that are not there (yet)."""
    topology = plan.topology
    named = {
        "source.prompt_data": topology.source.prompt_data,
        "trainer.hf_checkpoint": topology.trainer.hf_checkpoint,
        "run.key": topology.run.key,
        "run.custom_config_path": topology.run.custom_config_path,
    }
    named["trainer.load"] = topology.trainer.load
    named["trainer.critic_load"] = topology.trainer.critic_load
    named["algorithm.opd_teacher_load"] = topology.algorithm.opd_teacher_load
    if topology.algorithm.use_kl_loss or topology.algorithm.kl_coef:
        named["trainer.ref_load"] = topology.trainer.ref_load
    for option, path in named.items():
        if path is not None and not Path(path).exists():
            yield f"{option}: there is no {path} in {Path.cwd()}"
    for data in plan.eval_sets:
        if not Path(data.path).exists():
            yield f"eval.eval_prompt_data: there is no {data.path} in {Path.cwd()}"


def _section(console: Console, title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def _processes(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("name", "runs", "threads", "what"):
        table.add_column(column)
    for process in plan.processes:
        threads = process.env.get("OMP_NUM_THREADS", "")
        table.add_row(
            process.name, ", ".join(process.roles), threads, _what(plan, process.role, process.index)
        )
    return table


def _what(plan: Plan, role: str, index: int | None) -> str:
    topology = plan.topology
    if role == "generator" and index is not None:
        generator = topology.generator[index]
        return f"engine {generator.engine}, {generator.concurrency} at once, {generator.on_new_weights}"
    if role == "reward" and index is not None:
        reward = topology.reward[index]
        return f"{reward.use}, {reward.concurrency} at once, {reward.timeout_s:g} s each"
    if role == "trainer":
        return f"{topology.trainer.hf_checkpoint} on {topology.trainer.device}, {topology.trainer.dtype}"
    if role == "source":
        return topology.source.data_source_path or topology.source.prompt_data or ""
    return f"keeps {'everything' if topology.buffer.keep == 'all' else 'what checkpoints need'}"


def _credits(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=True, header_style="dim")
    table.add_column("hop")
    table.add_column("samples", justify="right")
    table.add_column("MiB", justify="right")
    for credit in plan.credits:
        table.add_row(credit.hop, str(credit.samples or "-"), f"{credit.max_bytes / 2**20:g}")
    return table
