"""Named corrections: what they expand to, what disagrees with them, and what a replay makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from asyncrl.cli.check import expansion
from asyncrl.cli.explain import explanation
from asyncrl.errors import ConfigError
from asyncrl.topology import catalogue, load, words
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.presets import PRESETS, REPLACED, flags_of, shown
from tests.support import topologies


def compiled(algorithm: str, *overrides: str) -> Plan:
    return topologies.compiled("rollout_max_response_len=300", *overrides, tables=f"[algorithm]\n{algorithm}")


def refused(algorithm: str, *overrides: str) -> list[str]:
    return topologies.problems("rollout_max_response_len=300", *overrides, tables=f"[algorithm]\n{algorithm}")


def changed(plan: Plan) -> dict[str, Any]:
    """The options of [algorithm] that are not their defaults, but for what compiling fills in."""
    options = catalogue.tables()["algorithm"].options
    filled = msgspec.structs.asdict(compiled("").topology.algorithm)
    values = msgspec.structs.asdict(plan.topology.algorithm)
    return {
        name: value
        for name, value in values.items()
        if value not in (options[name].default, filled[name]) and name != "correction"
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_flags_and_compiles(name: str) -> None:
    options = catalogue.tables()["algorithm"].options
    flags, problems = flags_of(name, response_length=300)
    algorithm = compiled(f'correction = "{name}"').topology.algorithm
    assert problems == []
    assert all(getattr(algorithm, flag) == value for flag, value in flags.items())
    by_hand = compiled("", *(f"algorithm.{flag}={shown(value)}" for flag, value in flags.items()))
    assert msgspec.structs.replace(algorithm, correction="") == by_hand.topology.algorithm
    assert set(flags) <= set(options)


def test_what_the_presets_stand_for() -> None:
    assert changed(compiled('correction = "none"')) == {}
    assert changed(compiled('correction = "tis"')) == {"use_tis": True}
    assert changed(compiled('correction = "icepop"')) == {
        "use_tis": True,
        "tis_mode": "mask",
        "tis_clip_low": 0.5,
    }
    assert changed(compiled('correction = "geometric-mask + tis"')) == {
        "use_tis": True,
        "use_rs": True,
        "rs_lower_bound": 0.99,
        "rs_upper_bound": 1.01,
    }
    assert changed(compiled('correction = "dr-grpo"')) == {
        "grpo_std_normalization": False,
        "pg_loss_divisor": 300.0,
    }
    assert changed(compiled('correction = "cispo"')) == {
        "advantage_estimator": "cispo",
        "eps_clip": 1.0,
        "eps_clip_high": 4.0,
    }


def test_every_two_presets_are_merged_or_refused() -> None:
    for one, other in itertools.combinations([name for name in PRESETS if name != "none"], 2):
        flags, problems = flags_of(f"{one}+{other}", response_length=300)
        disagree = {
            flag
            for flag in PRESETS[one].flags.keys() & PRESETS[other].flags.keys()
            if PRESETS[one].flags[flag] != PRESETS[other].flags[flag]
        }
        assert len(problems) == len(disagree)
        assert flags.keys() == PRESETS[one].flags.keys() | PRESETS[other].flags.keys()


@pytest.mark.parametrize(
    ("algorithm", "overrides", "expected"),
    [
        ('correction = "icepo"', [], 't.toml: algorithm.correction: unknown preset "icepo"; did you mean'),
        ('correction = "tis+"', [], 'unknown preset ""'),
        ('correction = "none+tis"', [], '"none" stands alone'),
        (
            'correction = "tis+sequence-tis"',
            [],
            'algorithm.correction: "tis" sets tis_level to "token" and "sequence-tis" to "sequence"',
        ),
        (
            'correction = "icepop"\ntis_clip = 3',
            [],
            (
                't.toml: algorithm.tis_clip: given 3, and correction = "icepop" stands for tis_clip = 2; '
                "leave one of the two out"
            ),
        ),
        ('correction = "tis"', ["use_tis=false"], "--set: algorithm.use_tis: given false"),
        ("use_tis = false", ["correction=tis"], "t.toml: algorithm.use_tis: given false"),
    ],
)
def test_what_disagrees_is_refused_with_both_values(
    algorithm: str, overrides: list[str], expected: str
) -> None:
    (found,) = refused(algorithm, *overrides)
    assert expected in found


def test_all_disagreements_are_told_at_once_beside_other_problems() -> None:
    found = refused('correction = "icepop+tis+x"\ntis_clip = 3\neps_clipp = 1')
    assert len(found) == 4
    assert any("eps_clipp" in problem for problem in found)


def test_a_flag_that_agrees_may_stand_beside_its_preset() -> None:
    plan = compiled('correction = "icepop"\ntis_clip = 2\nuse_tis = true')
    assert plan.topology.algorithm.use_tis


def test_a_value_of_another_type_is_the_decoders_problem() -> None:
    assert refused("correction = 3") == [
        "t.toml: algorithm.correction: given 3 (an integer); allowed: a string; write it in quotes"
    ]
    (found,) = refused("correction = 'dr-grpo'", "rollout.rollout_max_response_len=x")
    assert "rollout.rollout_max_response_len" in found


def test_a_topology_made_without_a_file_is_held_to_its_preset() -> None:
    topology = compiled("").topology
    algorithm = msgspec.structs.replace(topology.algorithm, correction="opsm")
    with pytest.raises(ConfigError, match=r"algorithm\.use_opsm: given false"):
        compile_plan(msgspec.structs.replace(topology, algorithm=algorithm))


def test_a_plan_records_the_flags_and_survives_another_override() -> None:
    plan = compiled('correction = "dr-grpo+icepop"')
    again = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert again == plan
    assert compile_plan(load.override(again.topology, ["run.stall_s=9"])).topology.algorithm == (
        plan.topology.algorithm
    )
    longer = load.override(again.topology, ["rollout_max_response_len=400"])
    assert longer.algorithm.pg_loss_divisor == 400.0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recorded", ["", "use_tis = true\nuse_opsm = true", 'correction = "mis"'])
def test_a_counterfactual_correction_takes_the_place_of_the_recorded_one(name: str, recorded: str) -> None:
    plan = compiled(recorded)
    replayed = compile_plan(load.override(plan.topology, [f"algorithm.correction={name}"]))
    fresh = compiled(f'correction = "{name}"').topology.algorithm
    if name == "none":  # as the value of --set that word takes an option away
        fresh = msgspec.structs.replace(fresh, correction="")
    assert replayed.topology.algorithm == fresh


def test_a_counterfactual_keeps_numbers_and_what_is_set_with_it() -> None:
    topology = compiled("use_opsm = true\nopsm_delta = 0.1\nuse_tis = true").topology
    opsm = load.override(topology, ["algorithm.correction=opsm"]).algorithm
    assert (opsm.use_tis, opsm.use_opsm, opsm.opsm_delta) == (False, True, 0.1)
    both = load.override(topology, ["algorithm.correction=opsm", "algorithm.use_tis=true"]).algorithm
    assert both.use_tis
    nothing = load.override(topology, ["algorithm.correction=none"]).algorithm
    assert not nothing.use_tis
    assert not nothing.use_opsm
    with pytest.raises(ConfigError, match=r"--set: algorithm\.use_opsm: given false"):
        load.override(topology, ["algorithm.correction=opsm", "algorithm.use_opsm=false"])


def test_what_is_replaced_are_options_without_which_a_topology_is_valid() -> None:
    assert set(catalogue.tables()["algorithm"].options) >= REPLACED


def test_check_and_explain_show_what_a_preset_stands_for() -> None:
    assert expansion(compiled('correction = "opsm+tis"')) == [
        '"opsm+tis" stands for',
        "  algorithm.use_opsm = true",
        "  algorithm.use_tis = true",
        '  algorithm.tis_level = "token"',
        '  algorithm.tis_mode = "clip"',
    ]
    told = " ".join(" ".join(line.split()) for line in explanation("algorithm.correction"))
    for name, preset in PRESETS.items():
        assert name in told
        assert all(flag in told for flag in preset.flags)


def test_staleness_without_a_correction_names_presets() -> None:
    (warning,) = words.warnings(compiled(""))
    assert warning.startswith("algorithm.correction: samples may be stale")
    assert words.warnings(compiled('correction = "tis"')) == []
