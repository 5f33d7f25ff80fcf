"""What an actor says: structlog records as JSON lines in its own file, and on the terminal as text.

Every process calls `configure` once, before its first record. Records of `structlog`, of the standard library
and of `warnings` take the same road. Only the supervisor owns the terminal: other processes are configured
with console "none", hand their records to `forward`, and the supervisor shows them with `Logging.show`.
Usable from any thread. A disk that refuses a line costs that line, never the run: see `Logging.num_failed`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import orjson
import structlog

from asyncrl.messages.sample import Lane, Settled
from asyncrl.obs.jsonl import JsonlFile
from asyncrl.obs.text import printable

Console = Literal["pretty", "plain", "none"]
Level = Literal["debug", "info", "warning", "error"]
Sink = Callable[[bytes], object]

_FRAME = ("t", "level", "run", "actor", "event", "exception", "stack")
_COLOURS = {"debug": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class Logging:
    """The set-up of this process. Close it before configuring anew, and before the process ends."""

    def __init__(self, handler: logging.Handler, *, journal: JsonlFile | None, show: Sink | None) -> None:
        self._handler = handler
        self._journal = journal
        self._show = show

    @property
    def num_failed(self) -> int:
        """Lines the disk refused."""
        return self._journal.num_failed if self._journal is not None else 0

    def show(self, line: bytes) -> None:
        """Print a record that another process forwarded; it is in that process's file already."""
        if self._show is not None:
            self._show(line)

    def close(self) -> None:
        """Take everything down again. May be called twice."""
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
        if self._journal is not None:
            self._journal.close()


def configure(
    *,
    actor: str,
    run_dir: Path | None,
    console: Console,
    level: Level = "info",
    run: str = "",
    forward: Callable[[bytes], None] | None = None,
) -> Logging:
    """Send this process's records to RUN_DIR/log/ACTOR.jsonl and, if it owns one, to the terminal (stderr).

    `run_dir` is the attempt's directory, RUN/attempt-NNN (None: no file). `forward` gets each record as one
    JSON object, on the thread that logged it: it must neither block nor raise. A record names the `actor` and
    the `run` given here unless `structlog.contextvars` bind others (several actors in one process).
    """
    journal = JsonlFile(run_dir / "log" / f"{actor}.jsonl") if run_dir is not None else None
    show = {"pretty": _show_pretty, "plain": _show_plain, "none": None}[console]
    write = journal.append if journal is not None else None
    sinks: list[Sink] = [sink for sink in (write, forward, show) if sink is not None]
    shared = _processors(actor=actor, run=run)
    handler = _Handler(sinks)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _render],
        )
    )
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level.upper())
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # A logger made at import time must follow a later configure.
        cache_logger_on_first_use=False,
    )
    return Logging(handler, journal=journal, show=show)


def step_line(
    log: structlog.stdlib.BoundLogger,
    *,
    step: int,
    total_steps: int | None,
    version: int,
    reward: float,
    loss: float,
    num_samples: int,
    num_tokens: int,
    step_s: float,
    wait_s: float,
    staleness_mean: float,
    staleness_max: float,
) -> None:
    """The one line of a rollout step (tokens trained; seconds of the step and of the wait for its batch)."""
    log.info(
        "step",
        step=step,
        total_steps=total_steps,
        version=version,
        reward=reward,
        loss=loss,
        num_samples=num_samples,
        num_tokens=num_tokens,
        step_s=step_s,
        wait_s=wait_s,
        staleness_mean=staleness_mean,
        staleness_max=staleness_max,
    )


def version_line(
    log: structlog.stdlib.BoundLogger,
    *,
    version: int,
    incarnation: int,
    step: int,
    digest: str,
    num_bytes: int,
    seconds: float,
    pause_s: float | None = None,
) -> None:
    """The one line of a version: from the trainer that published it, from a generator that serves it.

    `step` counts optimizer steps; `seconds` is the snapshot's or the transfer's, `pause_s` the generator's.
    """
    log.info(
        "version",
        version=version,
        incarnation=incarnation,
        step=step,
        digest=digest,
        num_bytes=num_bytes,
        seconds=seconds,
        pause_s=pause_s,
    )


def group_line(
    log: structlog.stdlib.BoundLogger,
    *,
    group_id: int,
    settled: Settled,
    lane: Lane,
    issue_version: int | None,
    num_samples: int,
    num_tokens: int,
    step: int | None = None,
    detail: str = "",
) -> None:
    """The one line of a settled group; `step` where it was trained, `detail` where there is a reason."""
    log.info(
        "group",
        group_id=group_id,
        settled=settled.value,
        lane=lane.value,
        issue_version=issue_version,
        num_samples=num_samples,
        num_tokens=num_tokens,
        step=step,
        detail=detail,
    )


def text_of(line: bytes, *, colour: bool = False) -> str:
    """A record's JSON line for people: time, level unless info, actor, event, the rest as key=value."""
    record = orjson.loads(line)
    level = str(record.get("level", "info"))
    when = datetime.fromisoformat(record["t"]).astimezone().strftime("%H:%M:%S") if "t" in record else "-"
    head = [str(record.get("actor", "-")), printable(str(record.get("event", "")))]
    fields = [f"{key}={_value(value)}" for key, value in record.items() if key not in _FRAME]
    words = head + fields if level == "info" else [level, *head, *fields]
    body = " ".join(words)
    for key in ("exception", "stack"):
        if key in record:
            body += "\n  " + printable(str(record[key])).replace("\n", "\n  ")
    if not colour:
        return f"{when} {body}"
    paint = _COLOURS.get(level, "")
    return f"{_DIM}{when}{_RESET} {paint}{body}{_RESET if paint else ''}"


class _Handler(logging.Handler):
    """Renders a record once and hands the line to every sink."""

    def __init__(self, sinks: list[Sink]) -> None:
        super().__init__()
        self._sinks = sinks

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="replace")
        except Exception:  # noqa: BLE001 - a caller's value that cannot be rendered must not end the caller
            self.handleError(record)
            return
        for sink in self._sinks:
            sink(line)


def _processors(*, actor: str, run: str) -> list[structlog.typing.Processor]:
    def name_process(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # Not bound as context variables: threads start without their parent's.
        event.setdefault("actor", actor)
        if run:
            event.setdefault("run", run)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        name_process,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", key="t"),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]


def _render(_: Any, __: str, event: structlog.typing.EventDict) -> str:
    first = {key: event[key] for key in _FRAME if key in event}
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(first | dict(event), default=repr, option=options).decode()


def _show_plain(line: bytes) -> None:
    _print(text_of(line))


def _show_pretty(line: bytes) -> None:
    _print(text_of(line, colour=True))


def _print(text: str) -> None:
    # Looked up at each line: a live view replaces sys.stderr to print above itself.
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        # The terminal is gone; nobody is left to read this, and the run goes on.
        return


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    plain = bool(text) and text.isprintable() and " " not in text
    return text if plain else repr(text)
