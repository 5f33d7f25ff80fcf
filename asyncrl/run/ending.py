"""What follows a run: the audit, the exported model's accuracy, the summary, the final exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from asyncrl.buffer import deaths
from asyncrl.buffer.audit import audit
from asyncrl.buffer.lengths import in_words, of_records, tokens_dropped
from asyncrl.buffer.records import Records
from asyncrl.errors import ExitCode, StorageError
from asyncrl.obs.metrics import MetricsWriter
from asyncrl.obs.summary import RunSummary, SummaryTable
from asyncrl.run.session import Session
from asyncrl.topology.plan import Plan

EXPORT_TIMEOUT_S = 600.0
"""How long plain transformers may take over the held-out prompts."""


def conclude(session: Session, code: ExitCode, *, console: Console) -> ExitCode:
    """Audit, verify the export, print the summary; returns the exit code that tells the truth."""
    run_dir = session.run_dir.path
    if not (run_dir / "buffer.db").exists():
        if session.detail:
            Console(stderr=True, highlight=False).print(f"asyncrl: {session.detail}", soft_wrap=True)
        return code
    report = audit(run_dir)
    exported = None
    problems = []
    if not report.closes:
        problems.append("the audit does not close")
    with Records(run_dir) as records:
        newest = max((row.path for row in records.checkpoints()), default=None)
        if code is ExitCode.FINISHED and session.plan.topology.eval.verify_export and newest:
            console.print(
                "taking the accuracy again from the exported checkpoint, by transformers generate ..."
            )
            exported = exported_accuracy(session.plan, newest)
        summary = summarise(session, records, code, exported=exported, export_dir=newest or "")
    minimum = session.plan.topology.eval.min_final_accuracy
    if code is ExitCode.FINISHED and minimum is not None and (summary.accuracy_after or 0.0) < minimum:
        problems.append(
            f"held-out accuracy ended at {summary.accuracy_after}, below eval.min_final_accuracy {minimum}"
        )
    if problems and code is ExitCode.FINISHED:
        code = ExitCode.FAILED
    detail = "; ".join([*filter(None, [session.detail]), *problems])
    verdict = f"{len(report.equations)} equations hold"
    if not report.closes:
        verdict = "; ".join(f"{e.name}: {e.broken or 'the sides differ'}" for e in report.broken[:3])
    summary = msgspec.structs.replace(
        summary, exit_code=code, detail=detail, audit_closes=report.closes, audit=verdict
    )
    _record(run_dir, summary)
    session.run_dir.set_status(exit_code=int(code), detail=detail)
    session.run_dir.write("summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=1))
    console.print(SummaryTable(summary))
    if session.view.examples:
        console.print("answers of the last evaluation:", style="dim")
    for example in session.view.examples:
        console.print(f"  {example}", soft_wrap=True, markup=False)
    return code


def _record(run_dir: Path, summary: RunSummary) -> None:
    """The figures of the whole run, as metrics beside those of its processes."""
    values = {
        "overlap/fraction": summary.overlap,
        "overlap/achieved_over_bound": summary.achieved_over_bound,
        "staleness/mean": summary.staleness_mean,
        "staleness/max": summary.staleness_max,
    }
    writer = MetricsWriter(run_dir / "metrics" / "supervisor.jsonl")
    writer.write({name: value for name, value in values.items() if value is not None}, step=summary.steps)
    writer.close()


def summarise(
    session: Session, records: Records, code: ExitCode, *, exported: float | None, export_dir: str
) -> RunSummary:
    """The numbers of the run, from its records."""
    figures = records.figures()
    evaluations = records.evaluations()
    means = {v: sum(values.values()) / len(values) for v, values in evaluations.items() if values}
    versions = sorted(means)
    rewards = [reward for _, reward in sorted(figures.reward_by_batch.items())]
    return RunSummary(
        run=session.run_dir.path.name,
        run_dir=str(session.run_dir.path),
        exit_code=code,
        steps=figures.num_trained,
        total_steps=session.plan.num_rollout,
        wall_s=max(figures.wall_s, 1e-9)
        if figures.wall_s
        else time.time() - session.run_dir.status.started_at,
        num_samples=_trained_samples(records),
        generated_tokens=figures.received_tokens,
        trained_tokens=figures.trained_tokens,
        fleet=session.supervisor.watch.in_words() if session.supervisor is not None else "",
        lengths=in_words(of_records(records.db)),
        tokens_dropped=tokens_dropped(records.totals()),
        num_failed=records.totals().get("settled.failed.groups", 0),
        deaths=deaths.in_words(records.deaths()),
        reward_first=rewards[0] if rewards else None,
        reward_last=rewards[-1] if rewards else None,
        accuracy_before=means[versions[0]] if versions and versions[0] == 0 else None,
        accuracy_after=means[versions[-1]] if versions else None,
        accuracy_exported=exported,
        export_dir=export_dir,
        overlap=figures.overlap_share,
        achieved_over_bound=figures.achieved_over_bound,
        staleness_mean=figures.staleness_mean,
        staleness_max=figures.staleness_max,
        max_staleness=session.plan.topology.rollout.max_staleness,
    )


def _trained_samples(records: Records) -> int:
    return records.totals().get("settled.trained.samples", 0)


def exported_accuracy(plan: Plan, checkpoint: str) -> float | None:
    """Accuracy of an exported checkpoint by plain transformers, in its own process; None without data."""
    source, evals = plan.topology.source, plan.topology.eval
    if not plan.eval_sets:
        return None
    command = [
        sys.executable, "-m", "asyncrl.train.evaluate", checkpoint, plan.eval_sets[0].path,
        "--input-key", evals.eval_input_key or source.input_key,
        "--label-key", evals.eval_label_key or source.label_key or "label",
        "--max-new-tokens", str(evals.eval_max_response_len),
        "--reward", plan.topology.reward[0].use,
    ]  # fmt: skip
    if source.apply_chat_template:
        command += [
            "--apply-chat-template",
            "--apply-chat-template-kwargs",
            json.dumps(source.apply_chat_template_kwargs),
        ]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, timeout=EXPORT_TIMEOUT_S, check=True, env=dict(os.environ)
        )
        return float(json.loads(done.stdout.decode().strip().splitlines()[-1])["accuracy"])
    except (subprocess.SubprocessError, ValueError, KeyError, IndexError) as error:
        text = getattr(error, "stderr", b"") or b""
        raise StorageError(
            f"{Path(checkpoint)}: the export could not be evaluated: {error} {text.decode()[-500:]}"
        ) from error
