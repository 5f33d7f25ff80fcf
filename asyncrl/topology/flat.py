"""Every option of a topology under its bare name: what hooks find on `args`, as slime's and Miles' do."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncrl.topology.schema import Topology

ONE_TABLE = ("buffer", "weights", "eval", "run", "source", "algorithm", "trainer", "rollout")
"""Tables in the order in which a later one wins where two have an option of the same name."""


def flat_options(
    topology: Topology, *, generator: int | None = None, reward: int | None = None
) -> dict[str, Any]:
    """Option name -> value; `generator` and `reward` choose one of the repeated tables."""
    tables = [getattr(topology, name) for name in ONE_TABLE]
    if generator is not None:
        tables.insert(0, topology.generator[generator])
    if reward is not None:
        tables.insert(0, topology.reward[reward])
    options: dict[str, Any] = {}
    for table in tables:
        options |= msgspec.structs.asdict(table)
    return options
