"""Rewards to copy: one of each accepted form. Name yours in the topology:

    [[reward]]
    use = "plugins.rewards:length_aware"     # or "path/to/rewards.py:length_aware"

They run in child processes with a deadline (`timeout_s`), so they may import what they like, print, and
crash. A reward that cannot judge a sample should raise: the sample then fails by name, which is not a zero.
"""

from __future__ import annotations

from typing import Any

LENGTH_PENALTY_PER_TOKEN = 0.001


def length_aware(sample: Any) -> float:
    """The plainest form, (sample) -> number: right is 1, minus a little for every token."""
    right = sample.response.strip() == str(sample.label)
    return float(right) - LENGTH_PENALTY_PER_TOKEN * sample.response_length


async def format_and_answer(args: Any, sample: Any) -> dict[str, float]:
    """Slime's form, async (args, sample): a dict needs `reward_key` (here "score") in the topology.

    `args` has every option by its flag's name, and the keys of `custom_config_path`.
    """
    weight = getattr(args, "format_weight", 0.1)
    _, found, answer = sample.response.rpartition("Answer:")
    is_right = answer.strip() == str(sample.label)
    return {
        "score": float(is_right) + weight * bool(found),
        "right": float(is_right),
        "format": float(bool(found)),
    }


async def best_of_group(args: Any, samples: list[Any]) -> list[float]:  # noqa: ARG001
    """The batched form (`group_rm = true`): all answers to one prompt at once, a list of rewards back.

    Only the shortest right answer of a group gets 1; the other right ones get 0.5.
    """
    right = [sample.response.strip() == str(sample.label) for sample in samples]
    lengths = [sample.response_length for sample in samples]
    shortest = min((length for length, is_right in zip(lengths, right, strict=True) if is_right), default=0)
    return [
        (1.0 if length == shortest else 0.5) if is_right else 0.0
        for length, is_right in zip(lengths, right, strict=True)
    ]
