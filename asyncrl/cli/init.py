"""`asyncrl init`: writes a commented topology to start from; never overwrites a file."""

from __future__ import annotations

from pathlib import Path

import typer

from asyncrl.errors import ConfigError
from asyncrl.topology import template


def init(path: Path) -> None:
    """Writes the file and says what to do next.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="ascii") as file:
            file.write(template.starter())
    except FileExistsError:
        raise ConfigError(f"init: {path} exists and is left alone; give another path") from None
    except OSError as error:
        raise ConfigError(f"init: {path} cannot be written: {error.strerror}") from None
    typer.echo(
        f"wrote {path}; set trainer.hf_checkpoint and source.prompt_data in it, then run\n"
        f"  asyncrl check {path}\n  asyncrl launch --topology {path}"
    )
