"""One simulated run from scenario to outcome, and the outcome in words."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from asyncrl.sim.bodies import InvariantError
from asyncrl.sim.cluster import Cluster
from asyncrl.sim.faults import Faults, random_schedule
from asyncrl.sim.scenario import Scenario


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation did."""

    broken: str = ""
    """The invariant that does not hold, or the exception the ledger raised; empty: everything held."""
    detail: str = ""
    samples: int
    """Trained, in the surviving lineage."""
    finished_samples: int
    """Answers that generators finished, the lost and regenerated ones included."""
    batches: int
    retrained: int
    """Batches trained again after a death of the trainer."""
    evaluated: int
    """Samples of finished evaluations."""
    settled: dict[str, int]
    """Groups by how they settled."""
    tokens: dict[str, int]
    """Tokens by where they went."""
    staleness: dict[int, int]
    """Trained samples by the age of their oldest token, in rollout steps."""
    faults: dict[str, int]
    repeated: int
    overtaken: int
    lost: int
    """Messages that came twice, were overtaken, were lost with their connection."""
    refused: int
    """Results the desk refused by name."""
    events: int
    commits: int
    restores: int
    virtual_s: float
    wall_s: float
    cpu_s: float
    """Processor time of this process, which other processes of the machine do not lengthen much."""

    @property
    def holds(self) -> bool:
        """Whether every invariant held to the end of the run."""
        return not self.broken


def simulate(scenario: Scenario, run_dir: Path) -> Outcome:
    """Run it. What breaks is in the outcome, never raised, but for a scenario that makes no sense.

    Args:
        scenario: what to simulate.
        run_dir: an empty directory for the ledger's files; they stay, for a look at them.

    Raises:
        ConfigError: the schedule names an unknown fault.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    cluster = Cluster(scenario, run_dir)
    faults = Faults(cluster, scenario.schedule or random_schedule(scenario))
    broken = detail = ""
    try:
        cluster.run(faults.look)
    except InvariantError as error:
        broken, detail = error.invariant, str(error)
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
        # Whatever code under test raises is a finding, to be shown with the schedule that led there.
        broken, detail = f"the ledger raises {type(error).__name__}", _where(error)
    finally:
        cluster.desk.close()
    outcome = _outcome(cluster, faults, broken, detail)
    return msgspec.structs.replace(
        outcome, wall_s=time.perf_counter() - began, cpu_s=time.process_time() - cpu_began
    )


def _where(error: BaseException) -> str:
    trace, lines = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"{Path(code.co_filename).name}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    return "\n  ".join([f"{type(error).__name__}: {error}", *lines[-6:]])


def _outcome(cluster: Cluster, faults: Faults, broken: str, detail: str) -> Outcome:
    checks, totals, weather = cluster.checks, cluster.desk.ledger.book.totals, cluster.weather
    settled = {n.split(".")[1]: v for n, v in totals.items() if n.startswith("settled.") and "groups" in n}
    tokens = {n.split(".")[1]: v for n, v in totals.items() if n.startswith("settled.") and "tokens" in n}
    tokens |= {"received": totals["received.tokens"], "regenerated": totals["regenerated.tokens"]}
    return Outcome(
        broken=broken,
        detail=detail,
        samples=checks.trained_samples,
        finished_samples=cluster.stage.finished_samples,
        batches=cluster.desk.ledger.batches.num_trained,
        retrained=checks.retrained,
        evaluated=checks.evaluated_samples,
        settled=settled,
        tokens=tokens,
        staleness=dict(sorted(checks.staleness.items())),
        faults=dict(sorted(faults.done.items())),
        repeated=weather.repeated,
        overtaken=weather.overtaken,
        lost=weather.lost,
        refused=totals["refused.results"],
        events=cluster.clock.num_events,
        commits=cluster.desk.num_commits,
        restores=cluster.desk.num_restores,
        virtual_s=cluster.clock.now,
        wall_s=0.0,
        cpu_s=0.0,
    )


def text(scenario: Scenario, outcome: Outcome) -> str:
    """The outcome for people."""
    rate = outcome.events / max(outcome.wall_s, 1e-9)
    ages = ", ".join(f"{age}: {count:,}" for age, count in outcome.staleness.items())
    lines = [
        (
            f"{outcome.samples:,} samples trained in {outcome.batches:,} batches, {outcome.retrained:,} "
            f"trained again; {outcome.evaluated:,} samples evaluated"
        ),
        f"groups: {_numbers(outcome.settled)}",
        f"tokens: {_numbers(outcome.tokens)}",
        f"trained samples by age of their oldest token (bound {scenario.max_staleness}): {ages}",
        f"{sum(outcome.faults.values()):,} faults: {_numbers(outcome.faults)}",
        (
            f"messages: {outcome.repeated:,} came twice, {outcome.overtaken:,} were overtaken, "
            f"{outcome.lost:,} were lost with their connection; {outcome.refused:,} results refused"
        ),
        (
            f"{outcome.events:,} events, {outcome.commits:,} commits, {outcome.restores:,} rebuilds; "
            f"everything checked every {scenario.check_every:,} events, the rest at every event"
        ),
        (
            f"{outcome.virtual_s / 3600:.2f} virtual hours in {outcome.wall_s:.1f} s (processor time "
            f"{outcome.cpu_s:.1f} s): {rate:,.0f} events/s, "
            f"{outcome.samples / max(outcome.wall_s, 1e-9):,.0f} samples/s"
        ),
    ]
    if outcome.holds:
        return "\n".join([*lines, "every invariant held"])
    lines += [f"BROKEN after {outcome.events:,} events: {outcome.broken}", outcome.detail]
    return "\n".join([*lines, "", "to repeat it:", scenario.command()])


def _numbers(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items()) or "none"
