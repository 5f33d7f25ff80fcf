"""Paths of a topology, made absolute: a recorded plan means the same wherever it is read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncrl.topology.schema import Topology


def absolute(topology: Topology) -> Topology:
    """The topology with files and directories as absolute paths (hooks named by file stay)."""
    replace = msgspec.structs.replace
    run, source, trainer, evals = topology.run, topology.source, topology.trainer, topology.eval
    data = list(evals.eval_prompt_data)
    start = 0 if len(data) == 1 else 1  # a lone value is a path; otherwise names and paths take turns
    data[start::2] = [_absolute(path) or "" for path in data[start::2]]
    return replace(
        topology,
        run=replace(run, key=_absolute(run.key), custom_config_path=_absolute(run.custom_config_path)),
        source=replace(source, prompt_data=_absolute(source.prompt_data)),
        trainer=replace(
            trainer,
            hf_checkpoint=_absolute(trainer.hf_checkpoint) or "",
            ref_load=_absolute(trainer.ref_load),
            load=_absolute(trainer.load),
            critic_load=_absolute(trainer.critic_load),
        ),
        algorithm=replace(
            topology.algorithm, opd_teacher_load=_absolute(topology.algorithm.opd_teacher_load)
        ),
        eval=replace(evals, eval_prompt_data=data),
        weights=replace(topology.weights, directory=_absolute(topology.weights.directory)),
    )


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else path
