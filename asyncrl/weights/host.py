"""Which host this is: two processes with the same identity may share memory and files by path."""

from __future__ import annotations

import platform
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_identity() -> str:
    """Equal in all processes of one running machine, different on any other.

    The boot id names the running kernel, so containers of one machine agree; whether they also see the same
    files is for the receiver to look at. Where there is none, the node's name and network address stand in.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"{platform.node()}-{uuid.getnode():012x}"
