"""Named corrections: what `algorithm.correction` stands for, as flags of [algorithm].

A preset is expanded while a file is read, before its values are decoded, so everything behind that (checks,
plan, hooks) sees only flags. Presets joined by "+" are merged. Nothing is ever overruled in silence: two
presets, or a preset and a flag given beside it, that want different values are a problem. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import msgspec

from asyncrl.topology import catalogue

Flags = Mapping[str, Any]
"""Option of [algorithm] -> value."""

RESPONSE_LENGTH = "rollout_max_response_len"
"""As the value of a flag: that option of [rollout], as a number of tokens."""
NONE = "none"
"""The preset that stands for no flag at all."""


class Preset(msgspec.Struct, frozen=True):
    """One name that `correction` may hold."""

    flags: dict[str, Any]
    """A value may be RESPONSE_LENGTH."""
    says: str
    """What it does, and where it comes from."""


_PRESETS = {
    NONE: Preset({}, "no correction"),
    "tis": Preset(
        {"use_tis": True, "tis_level": "token", "tis_mode": "clip"},
        "tokens weighed by the clipped ratio of the old policy to the engine's (slime and Miles: --use-tis)",
    ),
    "icepop": Preset(
        {"use_tis": True, "tis_level": "token", "tis_mode": "mask", "tis_clip": 2.0, "tis_clip_low": 0.5},
        "tokens whose ratio is out of 0.5 to 2 are left out (slime and Miles: icepop_function)",
    ),
    "sequence-tis": Preset(
        {"use_tis": True, "tis_level": "sequence", "tis_mode": "clip"},
        "answers weighed by the clipped product of their ratios: unbiased below the bound, of large variance",
    ),
    "geometric-mask": Preset(
        {"use_rs": True, "rs_level": "geometric", "rs_lower_bound": 0.99, "rs_upper_bound": 1.01},
        "answers whose mean ratio is out of 0.99 to 1.01 are left out (SkyRL's first recommendation)",
    ),
    "mis": Preset(
        {
            "use_tis": True,
            "tis_level": "token",
            "tis_mode": "truncate",
            "tis_clip": 1.5,
            "tis_batch_normalize": True,
            "use_rs": True,
            "rs_level": "geometric",
            "rs_lower_bound": 0.99,
            "rs_upper_bound": 1.001,
            "rs_veto_threshold": 1e-4,
        },
        "weights, rejection and veto with the values of Miles' mis.yaml",
    ),
    "opsm": Preset(
        {"use_opsm": True},
        "bad answers that the weights have moved away from are left out (DeepSeek-V3.2; set opsm_delta)",
    ),
    "decoupled": Preset(
        {"use_decoupled_loss": True, "prox_logp_method": "recompute"},
        "the clip around the old policy, weighed by its ratio to the engine's (AReaL)",
    ),
    "loglinear": Preset(
        {"use_decoupled_loss": True, "prox_logp_method": "loglinear"},
        "decoupled, with the old policy interpolated instead of computed (AReaL)",
    ),
    "dppo": Preset(
        {"use_dppo": True},
        "no clip; tokens whose probability moved too far are left out (prime-rl's default loss)",
    ),
    "cispo": Preset(
        {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 4.0},
        "the clipped ratio as a weight, so that no token loses its gradient (MiniMax-M1)",
    ),
    "gspo": Preset(
        {"advantage_estimator": "gspo"},
        "one ratio for an answer (arXiv:2507.18071; its clip range is 3e-4 and 4e-4: set eps_clip)",
    ),
    "dr-grpo": Preset(
        {"grpo_std_normalization": False, "pg_loss_divisor": RESPONSE_LENGTH},
        "no division by the group's deviation, nor by an answer's own length (arXiv:2503.20783)",
    ),
}
PRESETS: Mapping[str, Preset] = MappingProxyType(_PRESETS)
"""Every preset by name."""

REPLACED = frozenset(
    """use_tis tis_level tis_mode tis_batch_normalize custom_tis_function_path use_rs rs_level rs_lower_bound
    rs_upper_bound rs_veto_threshold use_opsm opsm_per_token use_decoupled_loss prox_logp_method use_dppo
    """.split()  # noqa: SIM905 - a list would take a page
)
"""Options that `asyncrl replay --set algorithm.correction=NAME` forgets about the recorded run: the name is
the whole correction of the counterfactual. Numbers (tis_clip, opsm_delta, ...) stay."""


def flags_of(correction: str, *, response_length: int) -> tuple[dict[str, Any], list[str]]:
    """The flags that a value of `correction` stands for, and the problems with it.

    `response_length` is rollout.rollout_max_response_len, in tokens.
    """
    flags: dict[str, Any] = {}
    owners: dict[str, str] = {}
    problems: list[str] = []
    names = [name.strip() for name in correction.split("+")] if correction.strip() else []
    if NONE in names and len(names) > 1:
        problems.append(f'given "{correction}"; "{NONE}" stands alone')
    for name in names:
        if name not in PRESETS:
            problems.append(_unknown(name))
            continue
        for flag, value in PRESETS[name].flags.items():
            wanted = float(response_length) if value == RESPONSE_LENGTH else value
            if flag in flags and flags[flag] != wanted:
                problems.append(
                    f'"{owners[flag]}" sets {flag} to {shown(flags[flag])} and "{name}" to {shown(wanted)}; '
                    f"choose one of the two presets"
                )
            flags.setdefault(flag, wanted)
            owners.setdefault(flag, name)
    return flags, problems


def expand(
    raw: dict[str, Any], *, replaces: bool = False, given: AbstractSet[str] = frozenset()
) -> list[str]:
    """Writes the flags of `correction` into the parsed tables `raw`; the problems, as `OPTION: TEXT`.

    A flag that is there already and disagrees is a problem, and stays. With `replaces`, what `raw` says of
    corrections (REPLACED, and the flags of the preset) is forgotten first, but for the keys in `given`.
    A `correction` that is no string is left to the decoder.
    """
    algorithm = raw.get("algorithm")
    if not isinstance(algorithm, dict):
        return []
    correction = algorithm.get("correction", "")
    flags, problems = _flags_in(raw)
    found = [f"algorithm.correction: {problem}" for problem in problems]
    if replaces:
        for flag in ({*REPLACED, *flags} - given) & set(algorithm):
            del algorithm[flag]
    for flag, value in flags.items():
        if flag in algorithm and algorithm[flag] != value:
            found.append(_disagreement(flag, algorithm[flag], value, correction))
        algorithm.setdefault(flag, value)
    return found


def retract(raw: dict[str, Any]) -> None:
    """Takes the flags of `correction` out of tables that hold them expanded, as a recorded plan's do.

    A value that is not the preset's own stays.
    """
    algorithm = raw.get("algorithm")
    if isinstance(algorithm, dict):
        for flag, value in _flags_in(raw)[0].items():
            if algorithm.get(flag) == value:
                del algorithm[flag]


def disagreements(algorithm: msgspec.Struct, *, correction: str, response_length: int) -> Iterator[str]:
    """What a topology says that its `correction` does not: possible where it was made without a file."""
    flags, problems = flags_of(correction, response_length=response_length)
    yield from (f"algorithm.correction: {problem}" for problem in problems)
    for flag, value in flags.items():
        if getattr(algorithm, flag) != value:
            yield _disagreement(flag, getattr(algorithm, flag), value, correction)


def listing() -> list[tuple[str, str, str]]:
    """(name, flags as they are written, what it does) of every preset."""
    return [(name, ", ".join(written(preset.flags)), preset.says) for name, preset in PRESETS.items()]


def written(flags: Flags) -> list[str]:
    """`flag = value` for each flag."""
    return [f"{flag} = {shown(value)}" for flag, value in flags.items()]


def shown(value: Any) -> str:
    """A value as TOML has it; RESPONSE_LENGTH as the option's name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value == RESPONSE_LENGTH else f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flags_in(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    correction = raw["algorithm"].get("correction", "")
    if not isinstance(correction, str):
        return {}, []
    rollout = raw.get("rollout")
    default = catalogue.tables()["rollout"].options[RESPONSE_LENGTH].default
    length = rollout.get(RESPONSE_LENGTH, default) if isinstance(rollout, dict) else default
    return flags_of(correction, response_length=length if isinstance(length, int) else default)


def _unknown(name: str) -> str:
    close = catalogue.did_you_mean(name, PRESETS)
    return f'unknown preset "{name}"{close}; known: {", ".join(PRESETS)}, and several joined by "+"'


def _disagreement(flag: str, given: Any, wanted: Any, correction: str) -> str:
    return (
        f'algorithm.{flag}: given {shown(given)}, and correction = "{correction}" stands for {flag} = '
        f"{shown(wanted)}; leave one of the two out"
    )
