"""The four-knob invariant of slime and Miles, solved for what was left out.

rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout
"""

from __future__ import annotations

from typing import NamedTuple

from asyncrl.topology.schema import Topology


class Knobs(NamedTuple):
    """The trainer's half of the invariant."""

    global_batch_size: int
    """Samples per optimizer step."""
    num_steps_per_rollout: int
    """Optimizer steps per rollout step."""


def solve(topology: Topology) -> Knobs | str:
    """The trainer's two knobs, or the problem with them."""
    rollout, trainer = topology.rollout, topology.trainer
    samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    size, steps = trainer.global_batch_size, trainer.num_steps_per_rollout
    if samples < 1 or (size is not None and size < 1) or (steps is not None and steps < 1):
        return Knobs(size or 1, steps or 1)  # the ranges have named it already
    left = (
        f"rollout_batch_size x n_samples_per_prompt = {rollout.rollout_batch_size} x "
        f"{rollout.n_samples_per_prompt} = {samples}"
    )
    if size is not None and steps is not None and size * steps != samples:
        return (
            f"trainer.global_batch_size: {left}, but global_batch_size x num_steps_per_rollout = {size} x "
            f"{steps} = {size * steps}; {_fix(samples, steps)}"
        )
    given = size if size is not None else steps
    if given is not None and samples % given:
        name = "global_batch_size" if size is not None else "num_steps_per_rollout"
        return f"trainer.{name}: {left} cannot be divided by {name} = {given}; {_divisors(samples, given)}"
    if size is not None:
        return Knobs(size, samples // size)
    return Knobs(samples // (steps or 1), steps or 1)


def _fix(samples: int, steps: int) -> str:
    if samples % steps == 0:
        return f"set global_batch_size = {samples // steps}, or leave one of the two out"
    return f"leave one of the two out; num_steps_per_rollout must divide {samples}"


def _divisors(samples: int, given: int) -> str:
    below = max(number for number in range(1, min(given, samples) + 1) if samples % number == 0)
    above = next((number for number in range(given, samples + 1) if samples % number == 0), None)
    nearest = f"{below}" if above is None else f"{below} or {above}"
    return f"the nearest values that divide it: {nearest}"
