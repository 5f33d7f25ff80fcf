"""What people see of a rollout step: its metrics, its one log line, the live view, and each concern once.

Changes nothing and waits for nobody but the supervisor, through `tell`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from structlog.stdlib import BoundLogger

from asyncrl.obs.log import step_line
from asyncrl.obs.metrics import MetricsWriter
from asyncrl.obs.view import NoteUpdate
from asyncrl.train.backend import StepReport
from asyncrl.train.report import concerns, step_metrics, step_update


class Showing:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        log: BoundLogger,
        metrics: MetricsWriter,
        tell: Callable[..., Awaitable[None]],
        total_steps: int | None,
    ) -> None:
        """`tell` is `Actor.tell`; `total_steps` is None where the data decides."""
        self._log = log
        self._metrics = metrics
        self._tell = tell
        self._total_steps = total_steps
        self._concerns: set[str] = set()

    async def show(
        self, report: StepReport, *, step: int, started: float, ended: float, waited_s: float
    ) -> None:
        """A step was trained.

        Args:
            report: of the backend.
            step: rollout steps in the weights, this one included.
            started: Unix seconds.
            ended: Unix seconds.
            waited_s: seconds before it in which there was no batch.
        """
        metrics = step_metrics(report, train_s=ended - started, waited_s=waited_s)
        self._metrics.write(metrics, step=step)
        update = step_update(report, step=step)
        step_line(
            self._log,
            step=step,
            total_steps=self._total_steps,
            version=step,
            reward=update.reward,
            loss=metrics.get("train/loss", 0.0),
            num_samples=report.num_samples,
            num_tokens=report.num_tokens,
            step_s=ended - started,
            wait_s=waited_s,
            staleness_mean=update.staleness_mean,
            staleness_max=update.staleness_max,
        )
        await self._tell(update)
        await self._warn(metrics, step=step)

    async def _warn(self, metrics: dict[str, float], *, step: int) -> None:
        """Say what is new among the concerns; one that lasts is said once."""
        found = concerns(metrics)
        for name in found.keys() - self._concerns:
            self._log.warning(found[name], step=step, metric=name, value=metrics[name])
            await self._tell(NoteUpdate(text=f"step {step}: {found[name]}"))
        self._concerns |= found.keys()
