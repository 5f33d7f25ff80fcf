"""The view as lines of text, for logs and for output that is not a terminal: one per step, per evaluation."""

from __future__ import annotations

from asyncrl.obs.text import decimal, duration, short
from asyncrl.obs.view import EvalUpdate, RunView


def step_text(view: RunView, *, now: float) -> str:
    """The canonical line of the newest step; "-" stands for what is not known yet."""
    last = view.last
    total = f"/{view.plan.total_steps}" if view.plan.total_steps is not None else ""
    return (
        f"step {view.step}{total}"
        f" reward {decimal(last.reward if last else None)}"
        f" gen {short(view.generated_per_s)} tok/s train {short(view.trained_per_s)} tok/s"
        f" staleness {decimal(last.staleness_mean if last else None, digits=1)}"
        f" queue ready {view.queue.counts.get('ready', 0)}"
        f" eta {duration(view.eta_s(now=now))}"
    )


def eval_text(update: EvalUpdate) -> str:
    """The canonical line of an evaluation, and its examples below it."""
    values = " ".join(f"{name} {value:.3f}" for name, value in sorted(update.values.items()))
    line = f"eval version {update.version} {values} samples {update.num_samples}"
    return "\n".join([line, *(f"  {example}" for example in update.examples)])


def waiting_text(view: RunView, *, now: float) -> str:
    """What to say when nothing has happened for a while: the phase, the bottleneck, the longest wait."""
    waiting = [m.report for m in view.present if m.report.waits_for]
    longest = max(waiting, key=lambda report: report.waits_for_s, default=None)
    where = (
        f"; {longest.name} waits {duration(longest.waits_for_s)} for {longest.waits_for}" if longest else ""
    )
    return f"{view.phase} for {duration(now - view.began)}, step {view.step}: {view.bottleneck}{where}"
