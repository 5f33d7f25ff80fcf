"""One launch: the run directory, the supervisor, the view on the terminal, the signals, the end.

topology -> plan -> preflight -> run directory -> supervisor ... -> audit, exported accuracy -> summary
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

from rich.console import Console

from asyncrl.actor.base import first_error
from asyncrl.actor.launchers import Launcher, ProcessLauncher, TaskLauncher
from asyncrl.actor.supervisor import Supervisor
from asyncrl.errors import AsyncrlError, ExitCode, StorageError
from asyncrl.link import Hub, Key, check_private, read_key
from asyncrl.obs import log
from asyncrl.obs.stacks import answering
from asyncrl.obs.top import Top
from asyncrl.obs.view import PlanUpdate, RunView, Update
from asyncrl.run.rundir import RunDir
from asyncrl.topology.plan import Plan
from asyncrl.weights.files import PREFIX, directory_of, remove_dead, run_id

REFRESH_S = 0.5


class Session:
    """A run from its first process to its last."""

    def __init__(
        self, plan: Plan, run: RunDir, *, in_process: bool = False, resumed: bool = False, plain: bool = False
    ) -> None:
        self.plan = plan
        self.run_dir = run
        self.resumed = resumed
        self.hub = Hub() if in_process else None
        self.console = Console(stderr=False, force_terminal=False if plain else None)
        self.view = RunView(now=time.monotonic())
        self.top = Top(self.view, console=self.console)
        self.attempt_dir = run.new_attempt()
        self.supervisor: Supervisor | None = None
        self._interrupts = 0

    def live(self) -> ExitCode:
        """See the run through; returns its exit code. Blocks."""
        import uvloop

        self._configure_console()
        logging = log.configure(
            actor="supervisor", run_dir=self.attempt_dir, console="none", run=self.plan.topology.run.name
        )
        self.run_dir.set_status(
            phase="starting", pid=os.getpid(), started_at=time.time(), exit_code=None, detail=""
        )
        try:
            with answering():
                code: ExitCode = uvloop.run(self._live())
        except (BaseExceptionGroup, AsyncrlError) as error:
            cause = first_error(error) if isinstance(error, BaseExceptionGroup) else error
            self._settle(cause.exit_code if isinstance(cause, AsyncrlError) else ExitCode.FAILED, str(cause))
            raise cause from None
        finally:
            logging.close()
        self._settle(code, self.detail)
        return code

    def _settle(self, code: ExitCode, detail: str) -> None:
        """Write down how it ended. Raises StorageError, with `detail`, where the disk does not take it."""
        phase = {ExitCode.FINISHED: "finished", ExitCode.DRAINED: "drained"}.get(code, "failed")
        try:
            self.run_dir.set_status(phase=phase, exit_code=int(code), detail=detail, address="", pid=0)
        except StorageError as error:
            # A disk that takes no status is seldom the first to say so.
            raise StorageError("; ".join(filter(None, [detail, str(error)]))) from error

    @property
    def detail(self) -> str:
        """Why the run failed; empty when it did not."""
        return self.supervisor.failure if self.supervisor is not None else ""

    def _configure_console(self) -> None:
        self._show(
            PlanUpdate(
                run=self.run_dir.path.name,
                run_dir=str(self.run_dir.path),
                total_steps=self.plan.num_rollout,
                max_staleness=self.plan.topology.rollout.max_staleness,
            )
        )

    def _show(self, update: Update) -> None:
        self.top.apply(update, now=time.monotonic())

    async def _live(self) -> ExitCode:
        run = self.plan.topology.run
        key = read_key(run.key) if run.key else None
        self.supervisor = self._make_supervisor(key)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                loop.add_signal_handler(number, self._interrupt)
        with self.top:
            ticking = asyncio.create_task(self._tick())
            try:
                return await self.supervisor.run()
            finally:
                self._clear_weights()
                ticking.cancel()
                self.top.refresh(now=time.monotonic(), force=True)

    def _make_supervisor(self, key: Key | None) -> Supervisor:
        address = "memory://control" if self.hub is not None else self.plan.topology.run.address
        check_private(address, security=key)
        return Supervisor(
            self.plan,
            launcher=self.make_launcher(),
            run_dir=self.run_dir.path,
            address=address,
            key=key,
            hub=self.hub,
            resumed=self.resumed,
            show=self._show,
            on_address=self._addressed,
        )

    def _clear_weights(self) -> None:
        """A trainer that was killed left its versions, in memory perhaps; nobody loads them any more."""
        directory = directory_of(self.plan.topology.weights.directory, self.run_dir.path)
        with contextlib.suppress(OSError):
            remove_dead(directory, f"{PREFIX}-{run_id(self.plan.topology.run.name, self.run_dir.path)}.i")

    def make_launcher(self) -> Launcher:
        """What starts the processes of this launch; a harness that starts them otherwise overrides it."""
        if self.hub is not None:
            return TaskLauncher(
                run_dir=self.run_dir.path, attempt_dir=self.attempt_dir, plan=self.plan, hub=self.hub
            )
        return ProcessLauncher(run_dir=self.run_dir.path, attempt_dir=self.attempt_dir)

    def _addressed(self, address: str, buffer_address: str) -> None:
        self.run_dir.set_status(phase="running", address=address, buffer_address=buffer_address)

    def _interrupt(self) -> None:
        assert self.supervisor is not None
        self._interrupts += 1
        if self._interrupts == 1:
            self.console.print(
                "draining: running answers are handed back, the present step ends, a checkpoint is saved; "
                "Ctrl-C again stops at once",
                highlight=False,
            )
            self._draining = asyncio.ensure_future(self.supervisor.drain())
        else:
            self.supervisor.stop()

    async def _tick(self) -> None:
        """produces: frames    waits for: the clock"""
        while True:
            await asyncio.sleep(REFRESH_S)
            self.top.refresh(now=time.monotonic())


def resumable(run: RunDir) -> str:
    """How to go on with a run, as a command."""
    return f"asyncrl launch --resume {run.path}"
