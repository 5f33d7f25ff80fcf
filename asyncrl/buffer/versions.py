"""Which version exists, which one generators are told to serve, and which one is being evaluated.

A version exists when it is committed (`published`). It is announced at once, unless an evaluation of the
announced one is still running: an evaluation names one version and never mixes two.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.messages.version import Manifest


@dataclass(slots=True)
class Evaluation:
    """One evaluation of one version."""

    version: int
    incarnation: int
    issued: bool = False
    """The source has handed in all of its prompts."""
    open_groups: int = 0
    done: bool = False
    seen: bool = False
    """The evaluator has logged it."""


class Versions:
    """See the module's docstring."""

    def __init__(self, *, evaluates: bool, eval_interval: int | None, skip_before_train: bool) -> None:
        self.evaluates = evaluates
        self.eval_interval = eval_interval
        self.skip_before_train = skip_before_train
        self.published: Manifest | None = None
        self.announced: Manifest | None = None
        self.available = False
        """Whether a living trainer holds the published version's bytes; not so after a restart."""
        self.evaluation: Evaluation | None = None
        """The newest evaluation, running or ended."""

    def publish(self, manifest: Manifest) -> bool:
        """A version is committed. False when it is the published one again (only its place changed)."""
        old = self.published
        self.published = manifest
        self.available = True
        again = old is not None and (old.version, old.digest) == (manifest.version, manifest.digest)
        if again and self.announced is not None and self.announced.version == manifest.version:
            self.announced = manifest
        return not again

    def announce(self) -> Manifest | None:
        """The version to tell generators of now; None when there is no news or an evaluation holds it back."""
        if self.published is None or not self.available or self.published is self.announced:
            return None
        if self.evaluating and self.announced is not None:
            return None
        self.announced = self.published
        return self.announced

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is running."""
        return self.evaluation is not None and not self.evaluation.done

    def start_evaluation(self, target: int | None) -> Evaluation | None:
        """An evaluation of the announced version, when one is due.

        Args:
            target: rollout steps of the whole run; its last version is always evaluated.
        """
        if not self.evaluates or self.announced is None or self.evaluating:
            return None
        if not self._is_due(self.announced.version, target):
            return None
        self.evaluation = Evaluation(self.announced.version, self.announced.incarnation)
        return self.evaluation

    def _is_due(self, version: int, target: int | None) -> bool:
        last = self.evaluation.version if self.evaluation is not None else -1
        if last >= version:
            return False
        if target is not None and version >= target:
            return True
        if version == 0:
            return not self.skip_before_train
        interval = self.eval_interval
        return interval is not None and version // interval > max(last, 0) // interval

    def finished(self, target: int) -> bool:
        """Whether the last version is published, and evaluated if it has to be."""
        if self.published is None or self.published.version < target:
            return False
        if not self.evaluates:
            return True
        last = self.evaluation
        return last is not None and last.version >= target and last.seen
