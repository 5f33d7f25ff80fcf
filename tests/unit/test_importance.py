"""Weights and rejection between engine and trainer: hand-computed cases and what must hold for any input."""

from __future__ import annotations

import math
from functools import partial
from math import exp
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.algo.correction import (
    SequenceMask,
    effective_sample_ratio,
    off_policy_sequence_mask,
    sequence_advantages,
)
from asyncrl.algo.importance import (
    Correction,
    Level,
    Mode,
    decoupled_weights,
    importance_weights,
    loglinear_proximal,
    rejection,
)
from asyncrl.algo.segment import per_sample_weights, weighted_sum


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.reshape(-1), double(*expected), rtol=tolerance, atol=tolerance)


TRAIN, ROLLOUT = double(-1, -1, -1, -3), double(-1, -2.5, -0.5, -0.2)
ONE: dict[str, Any] = {
    "mask_R": double(1, 1, 1, 1),
    "sample_R": torch.zeros(4, dtype=torch.int64),
    "num_samples": 1,
}


def test_tis_and_icepop_agree_with_the_references() -> None:
    tis = importance_weights(TRAIN, rollout_R=ROLLOUT, **ONE, upper=2.0, lower=0.5)
    close(tis.weight_R, 1, 2, exp(-0.5), 0.5)
    assert tis.keep_R.tolist() == [1.0] * 4
    close(tis.metrics["tis"], 1, exp(1.5), exp(-0.5), exp(-2.8))
    close(tis.metrics["tis_clipfrac"], 0, 1, 0, 1)
    close(tis.metrics["tis_abs"], 0, exp(1.5) - 1, 1 - exp(-0.5), 1 - exp(-2.8))
    icepop = importance_weights(TRAIN, rollout_R=ROLLOUT, **ONE, mode="mask", upper=2.0, lower=0.5)
    close(icepop.weight_R * icepop.keep_R, 1, 0, exp(-0.5), 0)
    close(icepop.metrics["tis_clipfrac"], 0, 1, 0, 1)


# Two sequences of three tokens, the third of the first one masked; d = old - rollout.
D = double(0.5, 1.0, -5.0, -0.2, -1.0, 0.1)
PAIR: dict[str, Any] = {
    "mask_R": double(1, 1, 0, 1, 1, 1),
    "sample_R": torch.tensor([0, 0, 0, 1, 1, 1]),
    "num_samples": 2,
}
ENGINE = double(-1, -2, -3, -1, -2, -3)
TOKEN = [exp(0.5), exp(1.0), 0.0, exp(-0.2), exp(-1.0), exp(0.1)]
SEQUENCE = [exp(1.5), exp(1.5), 0.0, exp(-1.1), exp(-1.1), exp(-1.1)]
GEOMETRIC = [exp(0.75), exp(0.75), 0.0, exp(-1.1 / 3), exp(-1.1 / 3), exp(-1.1 / 3)]
ALL = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def mis(level: Level, mode: Mode, **options: Any) -> Correction:
    where = {**PAIR, "rollout_R": ENGINE, "upper": 2.0, "lower": 0.5}
    return importance_weights(ENGINE + D, **where, level=level, mode=mode, **options)


def mis_rejection(level: Level, drift: Tensor = D, veto: float | None = 1e-4) -> Correction:
    return rejection(ENGINE + drift, rollout_R=ENGINE, **PAIR, level=level, upper=2.0, lower=0.5, veto=veto)


@pytest.mark.parametrize(
    ("level", "mode", "weights", "keep"),
    [
        ("token", "truncate", [TOKEN[0], 2.0, *TOKEN[2:]], ALL),
        ("token", "clip", [TOKEN[0], 2.0, 0.0, TOKEN[3], 0.5, TOKEN[5]], ALL),
        ("token", "mask", TOKEN, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
        ("sequence", "truncate", [2.0, 2.0, *SEQUENCE[2:]], ALL),
        ("sequence", "clip", [2.0, 2.0, 0.0, 0.5, 0.5, 0.5], ALL),
        ("sequence", "mask", SEQUENCE, [0.0] * 6),
        ("geometric", "truncate", [2.0, 2.0, *GEOMETRIC[2:]], ALL),
        ("geometric", "clip", [2.0, 2.0, *GEOMETRIC[2:]], ALL),
        ("geometric", "mask", GEOMETRIC, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    ],
)
def test_every_level_and_mode_of_mis(
    level: Level, mode: Mode, weights: list[float], keep: list[float]
) -> None:
    correction = mis(level, mode)
    close(correction.weight_R, *weights)
    assert correction.keep_R.tolist() == keep


MODE_METRICS = {
    "truncate": {"mis_tis_truncate_fraction": [0, 1, 0, 0]},
    "clip": {"mis_tis_clip_fraction_low": [0, 0, 0, 1], "mis_tis_clip_fraction_high": [0, 1, 0, 0]},
    "mask": {"mis_tis_mask_fraction_low": [0, 0, 0, 1], "mis_tis_mask_fraction_high": [0, 1, 0, 0]},
}


@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_mis_reports_what_the_bounds_did_and_what_came_of_it(mode: Mode) -> None:
    trained = torch.tensor([0, 1, 3, 4, 5])
    correction = mis("token", mode)
    metrics = {name: value[trained] for name, value in correction.metrics.items()}
    close(metrics["mis_tis_weight_before_bound"], *[TOKEN[i] for i in trained])
    after = correction.weight_R[trained]
    for name in ("mis_tis_weight_after_bound", "mis_is_ratio_mean_after_tis_rs"):
        close(metrics[name], *after.tolist())
    first, second = after[:2], after[2:]
    for name, of in (("mean", torch.mean), ("min", torch.amin), ("max", torch.amax)):
        expected = [of(first).item()] * 2 + [of(second).item()] * 3
        close(metrics[f"mis_is_ratio_{name}_final"], *expected)
    for name, flags in MODE_METRICS[mode].items():
        assert metrics[name][:4].tolist() == flags
    assert {name for name in metrics if "fraction" in name} == set(MODE_METRICS[mode])


def test_rejection_judges_tokens_sequences_or_geometric_means() -> None:
    assert mis_rejection("token").keep_R.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert mis_rejection("sequence").keep_R.tolist() == [0.0] * 6
    geometric = mis_rejection("geometric")
    assert geometric.keep_R.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert geometric.weight_R.tolist() == [1.0] * 6
    assert geometric.metrics["mis_rs_mask_fraction_high"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert geometric.metrics["mis_rs_mask_fraction_low"].tolist() == [0.0] * 6
    assert geometric.metrics["mis_rs_catastrophic_seq_fraction"].tolist() == [0.0] * 6


def test_a_veto_drops_the_whole_sequence_of_a_catastrophic_token_that_is_trained() -> None:
    # log 1e-4 = -9.21. The -50 stands at a masked token; at level token only the other one is out of bounds.
    drift = double(0, 0, -50, -9.3, 0.1, 0)
    vetoed = mis_rejection("token", drift)
    assert vetoed.keep_R.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert vetoed.metrics["mis_rs_catastrophic_token_fraction"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert vetoed.metrics["mis_rs_catastrophic_seq_fraction"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    free = mis_rejection("token", drift, veto=None)
    assert free.keep_R.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert not [name for name in free.metrics if "catastrophic" in name]
    assert mis_rejection("token", double(0, 0, 0, -9.2, 0.1, 0)).keep_R.tolist()[4:] == [1.0, 1.0]


def test_batch_normalisation_makes_the_mean_weight_one() -> None:
    token = mis("token", "clip", batch_normalize=True)
    factor = (exp(0.5) + 2 + exp(-0.2) + 0.5 + exp(0.1)) / 5
    close(token.weight_R, *[w / factor for w in (exp(0.5), 2, 0, exp(-0.2), 0.5, exp(0.1))])
    close(token.metrics["mis_batch_norm_factor"], *[factor] * 6)
    close(token.metrics["mis_tis_weight_after_bound"], exp(0.5), 2, 0, exp(-0.2), 0.5, exp(0.1))
    sequence = mis("sequence", "clip", batch_normalize=True)
    close(sequence.weight_R, *[w / 1.25 for w in (2, 2, 0, 0.5, 0.5, 0.5)])
    close(sequence.metrics["mis_is_ratio_mean_final"], 1.6, 1.6, 1.6, 0.4, 0.4, 0.4)
    assert "mis_batch_norm_factor" not in mis("token", "clip").metrics


def test_batch_normalisation_counts_rejected_tokens_and_not_masked_out_sequences() -> None:
    masked = mis("token", "mask", batch_normalize=True)
    factor = sum(TOKEN) / 5
    close(masked.weight_R, *[w / factor for w in TOKEN])
    where = {**PAIR, "mask_R": double(1, 1, 0, 0, 0, 0), "rollout_R": ENGINE}
    alone = importance_weights(ENGINE + D, **where, level="sequence", batch_normalize=True)
    close(alone.weight_R, 1, 1, 0, 0, 0, 0)


def test_what_cannot_be_is_refused_with_the_flag_to_change() -> None:
    with pytest.raises(ValueError, match=r"batch_normalize with level 'geometric'.*tis_batch_normalize"):
        mis("geometric", "clip", batch_normalize=True)
    with pytest.raises(ValueError, match=r"lower 3.0 and upper 2.0; allowed: 0 <= lower <= upper"):
        importance_weights(TRAIN, rollout_R=ROLLOUT, **ONE, upper=2.0, lower=3.0)
    with pytest.raises(ValueError, match=r"lower -1.0 .* set rs_lower_bound"):
        rejection(TRAIN, rollout_R=ROLLOUT, **ONE, upper=2.0, lower=-1.0)
    with pytest.raises(ValueError, match=r"veto 0.0; .* set rs_veto_threshold"):
        rejection(TRAIN, rollout_R=ROLLOUT, **ONE, veto=0.0)
    with pytest.raises(ValueError, match=r"cap 0.0; .* set behave_imp_weight_cap"):
        decoupled_weights(TRAIN, rollout_R=ROLLOUT, cap=0.0)
    with pytest.raises(ValueError, match="unknown mode 'cut'; known: clip, truncate, mask"):
        importance_weights(TRAIN, rollout_R=ROLLOUT, **ONE, mode="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown 'batch'; known: token, sequence, geometric"):
        rejection(TRAIN, rollout_R=ROLLOUT, **ONE, level="batch")  # type: ignore[arg-type]


def test_nothing_carries_a_gradient() -> None:
    old = TRAIN.clone().requires_grad_()
    version = torch.zeros(4, dtype=torch.int64)
    corrections = [
        importance_weights(old, rollout_R=ROLLOUT, **ONE, batch_normalize=True),
        rejection(old, rollout_R=ROLLOUT, **ONE),
        decoupled_weights(old, rollout_R=ROLLOUT),
    ]
    for correction in corrections:
        tensors = [correction.weight_R, correction.keep_R, *correction.metrics.values()]
        assert not any(tensor.requires_grad for tensor in tensors)
    assert not loglinear_proximal(old, rollout_R=ROLLOUT, version_R=version, proximal_version=3).requires_grad


def test_the_decoupled_weight_is_untruncated_and_dropped_above_its_cap() -> None:
    capped = decoupled_weights(double(-1, -1, -1), rollout_R=double(-1, -2.5, -3), cap=5.0)
    close(capped.weight_R, 1, exp(1.5), exp(2))
    assert capped.keep_R.tolist() == [1.0, 1.0, 0.0]
    close(capped.metrics["behave_imp_weight"], 1, exp(1.5), exp(2))
    close(capped.metrics["behave_approx_kl"], 0, 1.5, 2)
    assert capped.metrics["behave_mask_fraction"].tolist() == [0.0, 0.0, 1.0]
    assert decoupled_weights(double(-1), rollout_R=double(-90), cap=None).keep_R.tolist() == [1.0]
    close(decoupled_weights(double(-1), rollout_R=double(-90), cap=None).weight_R, exp(20))


def test_the_loglinear_proximal_policy_moves_from_the_engine_to_the_current_one_with_age() -> None:
    # Proximal version 7, current 8: alpha = (7 - v) / (8 - v).
    proximal = loglinear_proximal(
        double(-1, -1, -1, -1, -1),
        rollout_R=double(-3, -3, -3, -3, -3),
        version_R=torch.tensor([7, 6, 4, 0, 9]),
        proximal_version=7,
    )
    close(proximal, -3, -3 + 2 / 2, -3 + 2 * 3 / 4, -3 + 2 * 7 / 8, -3)


def test_a_rejected_token_still_counts_in_the_denominator() -> None:
    weights = per_sample_weights(
        PAIR["mask_R"], sample_R=PAIR["sample_R"], num_tokens_S=torch.tensor([2, 3]), num_samples=2
    )
    keep = mis("token", "mask").keep_R
    close(weighted_sum(torch.ones(6, dtype=torch.float64) * keep, weights_R=weights), (1 / 2 + 2 / 3) / 2)


drifts = st.lists(st.floats(-60, 60), min_size=6, max_size=6)
levels: st.SearchStrategy[Level] = st.sampled_from(["token", "sequence", "geometric"])
modes: st.SearchStrategy[Mode] = st.sampled_from(["clip", "truncate", "mask"])


@given(drift=drifts, level=levels, mode=modes)
def test_the_loss_weight_is_finite_and_within_its_bounds(
    drift: list[float], level: Level, mode: Mode
) -> None:
    where = {**PAIR, "rollout_R": ENGINE, "upper": 2.0, "lower": 0.5}
    correction = importance_weights(ENGINE + double(*drift), **where, level=level, mode=mode)
    effective = (correction.weight_R * correction.keep_R)[PAIR["mask_R"] > 0]
    low = 0.0 if mode == "truncate" else 0.5
    assert all(w == 0 or low <= w <= 2 for w in effective.tolist())
    assert all(value.isfinite().all() for value in correction.metrics.values())
    assert set(correction.keep_R.tolist()) <= {0.0, 1.0}


@given(drift=drifts, level=levels, mode=modes)
def test_packing_does_not_change_a_sequence(drift: list[float], level: Level, mode: Mode) -> None:
    d = double(*drift)
    together = importance_weights(ENGINE + d, rollout_R=ENGINE, **PAIR, level=level, mode=mode)
    rejected = rejection(ENGINE + d, rollout_R=ENGINE, **PAIR, level=level, veto=1e-4)
    for part in (slice(0, 3), slice(3, 6)):
        where = {
            "rollout_R": ENGINE[part],
            "mask_R": PAIR["mask_R"][part],
            "sample_R": torch.zeros(3, dtype=torch.int64),
            "num_samples": 1,
        }
        alone = importance_weights((ENGINE + d)[part], **where, level=level, mode=mode)
        torch.testing.assert_close(together.weight_R[part], alone.weight_R, rtol=1e-12, atol=0)
        assert torch.equal(together.keep_R[part], alone.keep_R)
        veto = rejection((ENGINE + d)[part], **where, level=level, veto=1e-4)
        assert torch.equal(rejected.keep_R[part], veto.keep_R)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_a_masked_token_has_no_influence(level: Level, junk: float) -> None:
    drift = D.clone()
    drift[2] = junk
    where = {**PAIR, "rollout_R": ENGINE}
    calls = (partial(importance_weights, batch_normalize=level != "geometric"), partial(rejection, veto=1e-4))
    for call in calls:
        clean, dirty = (call(ENGINE + d, **where, level=level) for d in (D, drift))
        assert torch.equal(clean.weight_R, dirty.weight_R)
        assert torch.equal(clean.keep_R, dirty.keep_R)
        assert all(torch.equal(clean.metrics[name], dirty.metrics[name]) for name in clean.metrics)


def test_no_tokens_give_no_weights() -> None:
    empty: dict[str, Any] = {
        "rollout_R": double(),
        "mask_R": double(),
        "sample_R": torch.zeros(0, dtype=torch.int64),
        "num_samples": 2,
    }
    assert importance_weights(double(), **empty, batch_normalize=True).weight_R.shape == (0,)
    sequence = importance_weights(double(), **empty, level="sequence", batch_normalize=True)
    assert sequence.weight_R.shape == (0,)
    assert rejection(double(), **empty, veto=1e-4).keep_R.shape == (0,)


def opsm(*, advantages: Tensor, drift: Tensor, delta: float = 1e-4) -> SequenceMask:
    """Three sequences of two tokens, each with a mean drift away from the engine."""
    sample = torch.tensor([0, 0, 1, 1, 2, 2])
    return off_policy_sequence_mask(
        -drift[sample],
        rollout_R=torch.zeros(6),
        mask_R=torch.ones(6),
        sample_R=sample,
        advantages_S=advantages,
        opsm_delta=delta,
    )


def test_opsm_drops_only_bad_sequences_that_drifted() -> None:
    mask = opsm(advantages=double(-1, 1, -1), drift=double(1, 1, 0))
    close(mask.keep_R, 0, 0, 1, 1, 1, 1)
    close(mask.dropped_S, 1, 0, 0)
    # slime's opsm_clipfrac, a sum over sequences of the fraction that was dropped
    close(((1 - mask.keep_R) / 2).sum(), 1.0)


def test_opsm_drift_is_a_mean_over_unmasked_tokens() -> None:
    for junk in (-5.0, math.nan):
        mask = off_policy_sequence_mask(
            double(junk, -0.1),
            rollout_R=double(0, 0),
            mask_R=double(0, 1),
            sample_R=torch.tensor([0, 0]),
            advantages_S=double(-1),
            opsm_delta=0.05,
        )
        assert mask.dropped_S.tolist() == [1.0]


def mixed_signs(**options: Any) -> SequenceMask:
    """Three tokens with advantages -3, 1, 1 and a sequence of a single good one; all have drifted."""
    sample, advantages = torch.tensor([0, 0, 0, 1]), double(-3, 1, 1, 1)
    signs = sequence_advantages(advantages, mask_R=torch.ones(4), sample_R=sample, num_samples=2)
    return off_policy_sequence_mask(
        double(-1, -1, -1, -1),
        rollout_R=torch.zeros(4),
        mask_R=torch.ones(4),
        sample_R=sample,
        advantages_S=signs,
        opsm_delta=0.5,
        **options,
    )


def test_opsm_takes_one_sign_per_sequence_and_keeps_shapes_apart() -> None:
    mask = mixed_signs()
    assert mask.keep_R.shape == (4,)
    close(mask.keep_R, 0, 0, 0, 1)
    close(mask.dropped_S, 1, 0)


def test_opsm_per_token_is_slimes_rule_and_needs_advantages_per_token() -> None:
    mask = mixed_signs(per_token=True, advantages_R=double(-3, 1, 1, 1))
    close(mask.keep_R, 0, 1, 1, 1)
    close(mask.dropped_S, 1, 0)
    with pytest.raises(ValueError, match=r"per_token without advantages_R"):
        mixed_signs(per_token=True)


def test_effective_sample_ratio_is_one_for_equal_weights_and_one_nth_for_a_single_one() -> None:
    ratio = effective_sample_ratio(
        double(0.3, 0.3, 0.3, 10, -10, -10, 0),
        mask_R=double(1, 1, 1, 1, 1, 1, 0),
        sample_R=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        num_samples=3,
    )
    close(ratio, 1, 1 / 3, 1, tolerance=1e-4)


def test_effective_sample_ratio_is_miles_formula() -> None:
    weights = [exp(0.2), exp(-0.4), exp(1.0)]
    ratio = effective_sample_ratio(
        double(0.2, -0.4, 1.0, 9.0),
        mask_R=double(1, 1, 1, 0),
        sample_R=torch.zeros(4, dtype=torch.int64),
        num_samples=1,
    )
    close(ratio, sum(weights) ** 2 / (3 * sum(w * w for w in weights)))
