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

    @property
    def key(self) -> tuple[int, int]:
        """(version, incarnation)."""
        return self.version, self.incarnation

    def is_of(self, manifest: Manifest | None) -> bool:
        """Whether it evaluates exactly this version."""
        return manifest is not None and self.key == (manifest.version, manifest.incarnation)


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
        self.held = False
        """Whether it holds the announced version's bytes, so that newcomers can load them."""
        self.evaluation: Evaluation | None = None
        """The newest evaluation, running or ended."""
        self.previous: Evaluation | None = None
        """The one before it."""
        self._again = False
        """Members may not have heard of the announced version, or know an old place for its bytes."""

    def publish(self, manifest: Manifest) -> bool:
        """A version is committed. False when it is the published one again (only its place changed)."""
        again = same_version(self.published, manifest)
        self.published = manifest
        self.available = True
        if same_version(self.announced, manifest):
            self._again = True
        return not again

    def trainer_left(self) -> None:
        """Nobody serves any version's bytes for now."""
        self.available = self.held = False

    def trainer_back(self, *, incarnation: int, num_trained: int) -> None:
        """The same life of the trainer is here again, with the bytes of whatever it published."""
        published, announced = self.published, self.announced
        self.available = published is not None and num_trained >= published.version
        self.held = announced is not None and (
            announced.incarnation == incarnation or (self.available and same_version(published, announced))
        )
        self._again = True

    def announce(self) -> Manifest | None:
        """The version to tell generators of now; None when there is no news.

        An evaluation holds a newer one back; the evaluated one is told again where it may have been missed.
        """
        if self.published is None or not self.available:
            return None
        if same_version(self.announced, self.published):
            news = self.published if self._again or not self.held else None
        elif self.evaluating and self.announced is not None:
            self._again, again = False, self._again
            return self.announced if again and self.held else None
        else:
            news = self.published
        if news is not None:
            self.announced, self.held, self._again = news, True, False
        return news

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
        if not self._is_due(self.announced, target):
            return None
        self.previous = self.evaluation
        self.evaluation = Evaluation(self.announced.version, self.announced.incarnation)
        return self.evaluation

    def evaluation_is_lost(self, served: set[tuple[int, int]]) -> bool:
        """Whether the running evaluation can never end: no generator serves its version or can load it.

        Args:
            served: (version, incarnation) of every generator that is here.
        """
        if self.evaluation is None or self.evaluation.done or self.held or not self.available:
            return False
        return not self.evaluation.is_of(self.published) and self.evaluation.key not in served

    def abandon_evaluation(self) -> Evaluation:
        """Forget the running evaluation, so that another version may be evaluated in its stead."""
        gone = self.evaluation
        assert gone is not None, "no evaluation to abandon"
        self.evaluation, self.previous = self.previous, None
        return gone

    def _is_due(self, announced: Manifest, target: int | None) -> bool:
        """Whether a multiple of `eval_interval` was reached since the last one.

        Versions that nobody was told of are passed over, as their bytes may be gone: 7 is evaluated for 6.
        """
        version, evaluated = announced.version, self.evaluation
        last = evaluated.version if evaluated is not None else -1
        if evaluated is not None and evaluated.is_of(announced):
            return False
        if target is not None and version >= target:
            return True  # the weights of the last step, even if those of a lost lineage were evaluated
        if last >= version:
            return False
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
        return last is not None and last.is_of(self.published) and last.seen


def same_version(left: Manifest | None, right: Manifest | None) -> bool:
    """Whether both are the same weights of the same life, wherever their bytes lie."""
    if left is None or right is None:
        return False
    return (left.version, left.incarnation) == (right.version, right.incarnation)
