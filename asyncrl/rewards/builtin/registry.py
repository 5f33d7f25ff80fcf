"""Which module holds which built-in reward; a module is imported when its reward is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from asyncrl.rewards.builtin.boxed import last_boxed
from asyncrl.topology.plugins import BOXED

WITH_ARGS = ("args", "sample")


def builtin(name: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The function of a built-in reward, `boxed_` ones too, and its form. Raises KeyError."""
    if name.startswith(BOXED):
        return _boxed(_plain(name.removeprefix(BOXED))), WITH_ARGS
    return _plain(name), WITH_ARGS


def _plain(name: str) -> Callable[..., Any]:
    from asyncrl.rewards.builtin import simple

    if name == "math":
        from asyncrl.rewards.builtin.math_answer import math_reward

        return math_reward
    if name == "remote_rm":
        from asyncrl.rewards.builtin.remote import RemoteReward

        return RemoteReward()
    return {
        "exact": simple.exact,
        "random": simple.random_reward,
        "deterministic_random": simple.deterministic_random,
        "none": simple.no_reward,
    }[name]


def _boxed(inner: Callable[..., Any]) -> Callable[..., Any]:
    def reward(args: Any, sample: Any) -> Any:
        return inner(args, dataclasses.replace(sample, response=last_boxed(sample.response) or ""))

    return reward
