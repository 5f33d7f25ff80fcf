"""From a specification to something that can be called: the reward, and the group filters.

Runs in a child only. Loads user code once, checks its signature, and hides which of the accepted forms it
has. It never judges results (`base.normalise` does) and keeps no time (`child` and its parent do).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from asyncrl.errors import ConfigError, RewardError
from asyncrl.messages.hooks import GENERATED_REWARD, HookSample
from asyncrl.rewards.base import RewardSpec, Verdict
from asyncrl.rewards.builtin.registry import builtin
from asyncrl.topology.plugins import BOXED, check_reward_name, is_plugin_path, load_checked


class Function:
    """A hook with the form it is called by."""

    def __init__(self, hook: Callable[..., Any], form: tuple[str, ...]) -> None:
        self.hook = hook
        self._with_args = form[0] == "args"

    async def __call__(self, args: Any, *rest: Any) -> Any:
        """Call it, and wait if it returns something to wait for."""
        value = self.hook(args, *rest) if self._with_args else self.hook(*rest)
        return await value if inspect.isawaitable(value) else value


def resolve(use: str, *, group_rm: bool = False, option: str = "reward.use") -> Function:
    """The reward that `use` names. Raises ConfigError (PluginError for user code)."""
    if is_plugin_path(use):
        kind = "group_reward" if group_rm else "reward"
        return Function(*load_checked(use, kind=kind, option=option))
    if problems := check_reward_name(use, option=option):
        raise ConfigError(*problems)
    return Function(*builtin(use))


class Judge:
    """Everything one child runs: one reward (and those that samples choose by `rm_type`) and the filters."""

    def __init__(self, spec: RewardSpec) -> None:
        """Raises ConfigError with everything that cannot be loaded."""
        self.spec = spec
        self.args = spec.args()
        self._is_custom = is_plugin_path(spec.use)
        self._by_name: dict[str, Function] = {spec.use: resolve(spec.use, group_rm=spec.group_rm)}
        if spec.use.removeprefix(BOXED) == "remote_rm" and not spec.rm_url:
            raise ConfigError(
                "reward.rm_url: remote_rm needs it; give the address that rewards are asked from"
            )
        self._keep = self._filter("dynamic_sampling_filter")
        self._choose = self._filter("buffer_filter")
        self._remove = self._filter("rollout_sample_filter")

    def _filter(self, kind: str) -> Function | None:
        option = f"{kind}_path"
        path: str | None = getattr(self.spec, option)
        return Function(*load_checked(path, kind=kind, option=f"rollout.{option}")) if path else None

    async def score(self, sample: HookSample) -> Any:
        """What the reward returns for one sample; a reward that generation set itself stands."""
        if GENERATED_REWARD in sample.metadata:
            return sample.metadata[GENERATED_REWARD]
        return await self._reward_for(sample)(self.args, sample)

    async def score_group(self, samples: Sequence[HookSample]) -> Any:
        """What the batched reward returns; a built-in one judges the samples in turn."""
        if self._is_custom and self.spec.group_rm:
            return await self._by_name[self.spec.use](self.args, list(samples))
        return [await self.score(sample) for sample in samples]

    def _reward_for(self, sample: HookSample) -> Function:
        name = sample.metadata.get("rm_type")
        # slime's order: a function of the user's stands above what the data asks for.
        if name is None or self._is_custom:
            return self._by_name[self.spec.use]
        if is_plugin_path(str(name)):
            raise RewardError(
                f'metadata.rm_type: "{name}" is no built-in reward; data cannot name code to run'
            )
        if name not in self._by_name:
            self._by_name[name] = resolve(str(name), option="metadata.rm_type")
        return self._by_name[name]

    async def verdict(self, group: list[HookSample]) -> Verdict:
        """What the filters say, in the references' order: keep the group, choose it, then remove samples."""
        if self._keep is not None:
            verdict = _as_verdict(await self._keep(self.args, group))
            if not verdict.keep:
                return verdict
        if self._choose is not None:
            chosen = await self._choose(self.args, None, [group], 1)
            if not isinstance(chosen, list):
                raise RewardError(
                    f"buffer_filter_path: returned {type(chosen).__name__}; a list of groups is needed"
                )
            if not chosen:
                return Verdict(keep=False, reason="buffer_filter")
        if self._remove is not None:
            await self._remove(self.args, [group])
        return Verdict(keep=True, removed=[i for i, sample in enumerate(group) if sample.remove_sample])


def _as_verdict(value: Any) -> Verdict:
    """A bool, or slime's DynamicFilterOutput. Raises RewardError for anything else."""
    if hasattr(value, "keep"):
        return Verdict(keep=bool(value.keep), reason=str(getattr(value, "reason", None) or ""))
    if isinstance(value, bool) or type(value).__name__ in {"bool_", "bool"}:
        return Verdict(keep=bool(value), reason="" if value else "dynamic_sampling_filter")
    raise RewardError(
        f"dynamic_sampling_filter_path: returned {type(value).__name__} {value!r:.80}; a bool or an "
        "object with .keep and .reason is needed"
    )
