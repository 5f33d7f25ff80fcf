"""The backend that trainer.backend names."""

from __future__ import annotations

from asyncrl.train.backend import Backend, TrainPlan


def make_backend(plan: TrainPlan) -> Backend:
    """The backend that trainer.backend names; nothing is loaded yet."""
    if plan.trainer.backend == "scripted":
        from asyncrl.train.scripted import ScriptedBackend

        return ScriptedBackend(plan)
    from asyncrl.train.torch import TorchBackend

    return TorchBackend(plan)
