"""What each kind of user code looks like: the signatures that slime and Miles call, as `plugins` checks them.

Pure data. The names of positional arguments are those of the references' documentation; a hook may name its
parameters otherwise as long as the call fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Hook:
    """What a kind of hook looks like."""

    forms: tuple[tuple[str, ...], ...]
    """Names of the positional arguments of each accepted call."""
    is_async: bool | None = False
    """True: must be a coroutine function. None: either."""
    methods: tuple[str, ...] = ()
    """For a class: the methods it must have."""
    keywords: tuple[str, ...] = ()
    """Arguments that every call passes by name, after the positional ones; more may come in time."""

    def describe(self) -> str:
        """The accepted signatures, for an error message."""
        if self.methods:
            return f"class Name{_shown(self.forms[0])} with methods {', '.join(self.methods)}"
        prefix = "async def" if self.is_async else "def"
        named = ("*", *self.keywords, "**kwargs") if self.keywords else ()
        return " or ".join(f"{prefix} name{_shown((*form, *named))}" for form in self.forms)


def _shown(form: Sequence[str]) -> str:
    return f"({', '.join(form)})"


KINDS: Mapping[str, Hook] = MappingProxyType(
    {
        "reward": Hook((("sample",), ("args", "sample")), is_async=None),
        "group_reward": Hook((("samples",), ("args", "samples")), is_async=None),
        "dynamic_sampling_filter": Hook((("args", "samples"),)),
        "buffer_filter": Hook((("args", "rollout_id", "buffer", "num_samples"),)),
        "rollout_sample_filter": Hook((("args", "data"),)),
        "generate": Hook(
            (("args", "sample", "sampling_params"), ("args", "sample", "sampling_params", "evaluation")),
            is_async=True,
        ),
        "data_source": Hook((("args",),), methods=("get_samples", "add_samples", "save", "load")),
        "custom_loss": Hook((("args", "batch", "logits", "sum_of_sample_mean"),)),
        "custom_tis": Hook(
            (("args",),),
            keywords=(
                "pg_loss",
                "train_log_probs",
                "rollout_log_probs",
                "loss_masks",
                "total_lengths",
                "response_lengths",
            ),
        ),
        "pg_loss_reducer": Hook(
            (("total_lengths", "response_lengths", "loss_masks", "calculate_per_token_loss"),)
        ),
        "advantage": Hook((("args", "rollout_data"),)),
        "reward_post_process": Hook((("args", "samples"),)),
        "convert_samples": Hook((("args", "samples"),)),
        "rollout_data_postprocess": Hook(
            (("args",), ("args", "samples"), ("args", "rollout_id", "rollout_data"))
        ),
        "before_log_prob": Hook((("args", "model", "store_prefix"),)),
        "before_train_step": Hook(
            (("args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler"),)
        ),
    }
)
"""Every kind `plugins.check_signature` knows."""

ALGORITHM_HOOKS: Mapping[str, str] = MappingProxyType(
    {
        "custom_loss_function_path": "custom_loss",
        "custom_tis_function_path": "custom_tis",
        "custom_pg_loss_reducer_function_path": "pg_loss_reducer",
        "custom_advantage_function_path": "advantage",
        "custom_reward_post_process_path": "reward_post_process",
        "custom_convert_samples_to_train_data_path": "convert_samples",
        "rollout_data_postprocess_path": "rollout_data_postprocess",
        "custom_before_log_prob_hook_path": "before_log_prob",
        "custom_before_train_step_hook_path": "before_train_step",
    }
)
"""Option of [algorithm] -> kind of hook that it names."""
