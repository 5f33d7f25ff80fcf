"""What the tests of live runs rely on: a job is started as it is told, and nothing of it gets away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.errors import ExitCode
from tests.support.command import ROOT, Job
from tests.support.nursery import Process, nursery, own_processes
from tests.support.processes import alive, children, wait_until
from tests.support.world import write_topology
from tools.chaos import kernel

DETACHED = """
import os, subprocess
stranger = ["sh", "-c", "echo $$ > orphan.tmp; mv orphan.tmp orphan; exec sleep 600"]
# A session of its own, no environment to be known by, no parent that lives.
if os.fork() == 0:
    null = subprocess.DEVNULL
    subprocess.Popen(stranger, start_new_session=True, env={"PATH": os.defpath}, stdout=null, stderr=null)
    os._exit(0)
os.wait()
"""
"""Leaves a process behind that shares nothing with the one that started it."""


class Impatient(Job):
    """Does not wait long for what a job leaves."""

    gone_s = 0.5


def execute(place: Path, code: str, **environment: str) -> Process:
    """A job that is a Python program."""
    return nursery().start(
        [sys.executable, "-c", code], place=place, output=place / "out", env={**os.environ, **environment},
        execute=True,
    )  # fmt: skip


def orphan(place: Path) -> int:
    """Process id of what DETACHED has left."""
    return int(
        wait_until(lambda: (place / "orphan").exists() and (place / "orphan").read_text(), "an orphan")
    )


@pytest.mark.parametrize(("end", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", -9), ("", 0)])
def test_a_job_ends_as_its_first_process_does(tmp_path: Path, end: str, code: int) -> None:
    process = execute(tmp_path, f"import os\n{end}")
    assert process.wait(timeout=20.0) == process.poll() == process.returncode == code
    wait_until(lambda: process.poll() == code and process.gone, "all of it to be gone")
    process.send_signal(signal.SIGKILL)  # nobody is hit
    process.close()


def test_a_job_has_the_directory_output_and_environment_it_is_given(tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), os.environ['MINE'], os.getsid(0) == os.getpid(), os.getpid())"
    process = execute(tmp_path, code, MINE="yes")
    assert process.wait(timeout=20.0) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path} yes True {process.pid}\n"
    process.close()


@pytest.mark.parametrize("forked", [True, False])
def test_a_command_is_the_real_one(tmp_path: Path, forked: bool) -> None:
    with Job("keys", "mine.key", cwd=tmp_path, output=tmp_path / "out", forked=forked) as job:
        assert job.end() == 0, job.text
        assert (tmp_path / "mine.key").exists()
    with Job("attach", "generator", "nowhere", cwd=tmp_path, output=tmp_path / "out", forked=forked) as job:
        assert job.end() != 0
        assert job.text.startswith("asyncrl: ")
        assert "Traceback" not in job.text


def test_a_signal_reaches_a_job_and_closing_ends_it(tmp_path: Path) -> None:
    before = own_processes()
    process = execute(
        tmp_path, "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('asked')\n"
    )
    assert own_processes() - before, "a job of a test counts as started by it"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    wait_until(lambda: b"-c" in Path(f"/proc/{process.pid}/cmdline").read_bytes(), "Python to be executed")
    process.send_signal(signal.SIGSTOP)
    process.close()
    assert process.returncode == -signal.SIGKILL
    assert not alive(process.pid)
    wait_until(lambda: own_processes() <= before, "its keeper to be gone")


def test_an_orphan_without_any_mark_is_still_its_jobs(tmp_path: Path) -> None:
    """Fails when what counts is the tree below a job's first process, its session or its environment."""
    process = execute(tmp_path, DETACHED)
    assert process.wait(timeout=20.0) == 0
    stranger = orphan(tmp_path)
    assert os.getsid(stranger) == stranger
    assert b"HOME" not in Path(f"/proc/{stranger}/environ").read_bytes()
    assert process.poll() == 0
    assert not process.gone
    assert [int(words.split()[0]) for words in process.left()] == [stranger]
    process.close()
    assert not alive(stranger)


def test_a_run_that_ends_and_leaves_a_process_fails_its_test(tmp_path: Path, model: Path) -> None:
    """The plug-in leaves one behind as soon as it is imported, by a process that the launch executes."""
    (tmp_path / "mine.py").write_text(f"{DETACHED}\nraise ValueError('mine')\n", encoding="utf-8")
    options = {"rollout.custom_generate_function_path": f"{tmp_path / 'mine.py'}:generate"}
    topology = write_topology(tmp_path, model, options)
    arguments = ("launch", "--topology", topology, "--plain")
    with (
        pytest.raises(AssertionError, match=r"all of an ended job to be gone.*sleep 600"),
        Impatient(*arguments, cwd=tmp_path, output=tmp_path / "out") as job,
    ):
        assert job.end() == ExitCode.CONFIG, job.text
    assert not alive(orphan(tmp_path))


def test_a_keeper_that_is_killed_is_no_proof_that_all_is_gone(tmp_path: Path) -> None:
    process = execute(tmp_path, "import time; time.sleep(600)")
    (keeper,) = {parent for parent in own_processes() if process.pid in children(parent)}
    os.kill(keeper, signal.SIGKILL)
    assert process.wait(timeout=20.0) == -signal.SIGKILL
    assert not process.gone
    with pytest.raises(AssertionError, match="was killed; what is left of the job is unknown"):
        process.close()
    wait_until(lambda: not alive(process.pid), "the job to die with its keeper")


def test_nothing_outlives_a_killed_pytest(tmp_path: Path) -> None:
    """Nor do orphans: whoever keeps a job is told of the death, and does not just share it."""
    code = (
        "import time, tests.contracts.test_nursery as mine\nfrom pathlib import Path\n"
        f"job = mine.execute(Path({str(tmp_path)!r}), mine.DETACHED + 'import time; time.sleep(600)')\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    pytest_ = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    family: set[int] = set()
    try:
        stranger = orphan(tmp_path)
        (nursery_pid,) = children(pytest_.pid)
        (keeper,) = children(nursery_pid)
        family |= {stranger, nursery_pid, keeper, *children(keeper)}
        assert len(family) >= 4
        # So that it is not faster than the kernel, which ends the nursery for it.
        os.kill(keeper, signal.SIGSTOP)
        pytest_.kill()
        wait_until(lambda: not alive(nursery_pid), "the nursery to die")
        os.kill(keeper, signal.SIGCONT)
        wait_until(lambda: not any(map(alive, family)), "everything to be gone")
    finally:
        pytest_.kill()
        pytest_.wait()
        kernel.send(family, signal.SIGKILL)
