"""The exceptions an operator may see, and what each one does to the exit code.

    AsyncrlError                     something an operator can act on; its text is the whole message
    +-- ConfigError                  exit 2: a topology, an option or a plug-in is wrong; nothing was started
    |   +-- PluginError              a hook cannot be loaded or has another signature
    +-- RunError                     exit 1: the run cannot go on
        +-- DataError                a prompt file or a model directory is missing, empty or malformed
        +-- StorageError             the ledger or a body could not be written or read
        +-- ProtocolError            a peer speaks another protocol, or breaks it
        +-- NumericsError            NaN or Inf in a loss or a gradient
        +-- NothingToTrainError      the filters refuse every group, or every group fails
        +-- RewardError              a reward hung, crashed or returned something that is not a reward
        +-- WeightsError             a version's bytes are missing or do not have its digest
        +-- StalledError             a wait ran past its deadline; says what it waited for

Internal invariants are `assert`; wrong arguments of a function are `ValueError`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a launcher or a scheduler needs to know, and nothing else."""

    FINISHED = 0
    FAILED = 1
    CONFIG = 2
    DRAINED = 3


class AsyncrlError(Exception):
    """Base of every error whose text is meant for the operator."""

    exit_code = ExitCode.FAILED
    final = False
    """Whether the same process, started again, would end the same way."""


class ConfigError(AsyncrlError):
    """A topology, an option or a file it names cannot be used. `problems` holds one line each."""

    exit_code = ExitCode.CONFIG
    final = True

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class PluginError(ConfigError):
    """A hook cannot be imported, is not callable, or has a signature other than the documented ones."""


class RunError(AsyncrlError):
    """The run cannot go on."""


class DataError(RunError):
    """A prompt file or a model directory is missing, empty or malformed; a batch cannot be trained."""

    final = True


class StorageError(RunError):
    """The ledger or a body could not be written or read back."""


class DamagedError(StorageError):
    """What was written and synced is not there any more as it was: reading it again would find the same."""

    final = True


class ProtocolError(RunError):
    """A peer speaks another protocol or breaks ours."""


class NumericsError(RunError):
    """NaN or Inf in a loss or a gradient: the recorded batch would give it again."""

    final = True


class NothingToTrainError(RunError):
    """Group after group is refused or fails: a buffer that starts again would see the same."""

    final = True


class RewardError(RunError):
    """A reward hung, crashed or returned something that is not a reward."""


class WeightsError(RunError):
    """A version's bytes are missing or do not have its digest."""


class StalledError(RunError):
    """A wait on another process ran past its deadline."""
