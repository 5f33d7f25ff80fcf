"""`asyncrl doctor`: why nothing moves, in one sentence, and everything that it rests on."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from asyncrl.errors import ExitCode
from asyncrl.obs.doctor import text
from asyncrl.run.doctor import examine
from asyncrl.run.remote import find


def doctor(run: str | None, *, as_json: bool, key: Path | None) -> int:
    """Print the report about a run."""
    report = examine(find(run), key=key)
    if as_json:
        shown = msgspec.json.format(msgspec.json.encode(report), indent=1).decode() + "\n"
    else:
        shown = text(report) + (f"\nreport: {report.path}\n" if report.path else "")
    sys.stdout.write(shown)
    return int(ExitCode.FINISHED)
