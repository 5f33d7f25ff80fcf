"""The smallest topology, with overrides: what it compiles to, or why it is refused."""

from __future__ import annotations

import pytest

from asyncrl.errors import ConfigError
from asyncrl.topology import load
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.schema import Topology

SOURCE = "t.toml"
BASE = """
[run]
num_rollout = 10
[source]
prompt_data = "p.jsonl"
[rollout]
rollout_batch_size = 32
n_samples_per_prompt = 8
max_staleness = 2
[trainer]
hf_checkpoint = "m"
"""


def topology(*overrides: str, tables: str = "") -> Topology:
    """The file with further tables, and what --set would change."""
    return load.parse(f"{BASE}\n{tables}\n", overrides, source=SOURCE)


def compiled(*overrides: str, tables: str = "") -> Plan:
    """What it compiles to."""
    return compile_plan(topology(*overrides, tables=tables))


def problems(*overrides: str, tables: str = "") -> list[str]:
    """Why it does not: every problem, with the place it is in."""
    with pytest.raises(ConfigError) as caught:
        compile_plan(topology(*overrides, tables=tables), source=SOURCE)
    return list(caught.value.problems)


def refused(*overrides: str, tables: str = "") -> list[str]:
    """Problems of a file that can be read: each names it, which is left out here."""
    found = problems(*overrides, tables=tables)
    assert all(problem.startswith(f"{SOURCE}: ") for problem in found)
    return [problem.removeprefix(f"{SOURCE}: ") for problem in found]
