"""Whether the [[reward]] tables give what [algorithm] needs of them: a teacher's log-probs.

Pure, and part of `checks`; see there for what a problem is.
"""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.checks_algorithm import DISTILLATION
from asyncrl.topology.plugins import is_plugin_path
from asyncrl.topology.schema import Topology

_READERS = ("custom_loss_function_path", "custom_advantage_function_path", "rollout_data_postprocess_path")
"""Functions of the user's that are handed teacher_log_probs whether or not the trainer distils."""


def problems(topology: Topology) -> Iterator[str]:
    """What is wrong with teacher_url; each sample may come to any table, so every table counts."""
    algorithm = topology.algorithm
    needed = _from_engine(algorithm)
    read = needed or any(getattr(algorithm, option) for option in _READERS)
    for table in topology.reward:
        option = f'reward "{table.name}".teacher_url'
        if table.teacher_url is None:
            if needed and not is_plugin_path(table.use):
                yield (
                    f'{option}: required by algorithm.opd_type = "engine" with use = "{table.use}", and not '
                    "given; set it to the address of the SGLang server that serves the teacher, or let a "
                    'reward function of yours set sample.teacher_log_probs, or set opd_type = "model"'
                )
            continue
        given = f'{option}: given "{table.teacher_url}"'
        if not table.teacher_url.startswith(("http://", "https://")):
            yield f'{given}; allowed: an address that starts with http:// or https://, "http://HOST:30000"'
        if not read:
            yield (
                f"{given}, and nothing uses the teacher's log-probs; set algorithm.use_opd = true with "
                'opd_type = "engine", or leave teacher_url out'
            )


def _from_engine(algorithm: AlgorithmConfig) -> bool:
    distils = algorithm.use_opd or algorithm.advantage_estimator == DISTILLATION
    return distils and algorithm.opd_type == "engine"
