"""The policy loss with all its corrections once more, in plain Python: no tensors, one token at a time."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

from asyncrl.topology.algorithm import AlgorithmConfig

STEP = 6
"""The rollout step at hand; versions are 2 to 6."""
LENGTHS = [5, 1, 7, 0, 4, 6, 3, 8, 2, 5]
MASKED_OUT = 4
"""A sample without a token in the loss."""


class Token(NamedTuple):
    """What is known of a token."""

    current: float
    old: float
    rollout: float
    advantage: float
    version: int
    mask: int


Case = list[list[Token]]


def make_case(*, same_old: bool = False, seed: int = 0) -> Case:
    """Samples whose three policies differ by enough for every bound to matter."""
    draw = random.Random(seed)
    case = []
    for i, length in enumerate(LENGTHS):
        drift, advantage, version = draw.gauss(0, 0.4), draw.gauss(0, 1), draw.randrange(2, STEP + 1)
        sample = []
        for t in range(length):
            old = -draw.random() * 2 - 0.2
            current = old if same_old else old + draw.gauss(0, 0.3)
            if t == length // 2:
                version = min(version + 1, STEP)
            mask = int(i != MASKED_OUT and (t == 0 or draw.random() < 0.8))
            rollout = min(old + drift + draw.gauss(0, 0.6), -0.01)
            sample.append(Token(current, old, rollout, advantage, version, mask))
        case.append(sample)
    return case


def plain(case: Case, options: dict[str, Any], *, old: bool = True) -> tuple[float, float]:
    """(policy loss, masked share) of the combination."""
    o = AlgorithmConfig(**options)
    rows = [[token._replace(old=proximal(token, o, old=old)) for token in sample] for sample in case]
    counts = [sum(token.mask for token in row) for row in rows]
    mean_weight = normalizer(rows, o) if o.tis_batch_normalize else 1.0
    loss = masked = 0.0
    for row, count in zip(rows, counts, strict=True):
        for t, token in enumerate(row):
            if not token.mask:
                continue
            share = 1 / sum(counts) if o.calculate_per_token_loss else 1 / count / len(rows)
            factor, kept = correction(row, t, o, mean_weight=mean_weight)
            masked += share * (not kept)
            if o.pg_loss_divisor is not None:
                share = 1 / o.pg_loss_divisor / len(rows)
            loss += share * surrogate(row, t, o) * factor * kept
    return loss, masked


def proximal(token: Token, o: AlgorithmConfig, *, old: bool) -> float:
    if o.prox_logp_method == "loglinear":
        alpha = (STEP - token.version) / (STEP + 1 - token.version)
        return token.rollout + alpha * (token.current - token.rollout)
    return token.old if old else token.current


def surrogate(row: list[Token], t: int, o: AlgorithmConfig) -> float:
    token = row[t]
    old = token.rollout if o.use_rollout_logprobs else token.old
    if o.use_dppo:
        d = token.current - token.rollout
        moved = math.exp(token.current) - math.exp(token.rollout)
        out = moved > o.dppo_mask_high if token.advantage > 0 else moved < -o.dppo_mask_low
        return (0.0 if out else -math.exp(d) * token.advantage) + o.dppo_kl_coef * d * d
    log_ratio = token.current - old
    if o.advantage_estimator == "gspo":
        kept = [x for x in row if x.mask]
        log_ratio = sum(x.current - (x.rollout if o.use_rollout_logprobs else x.old) for x in kept) / len(
            kept
        )
    ratio = math.exp(log_ratio)
    high = o.eps_clip if o.eps_clip_high is None else o.eps_clip_high
    clipped = min(max(ratio, 1 - o.eps_clip), 1 + high)
    if o.advantage_estimator == "cispo":
        return -clipped * token.advantage * token.current
    loss = max(-ratio * token.advantage, -clipped * token.advantage)
    if o.eps_clip_c is not None and token.advantage < 0:
        loss = min(loss, -o.eps_clip_c * token.advantage)
    return loss


def correction(row: list[Token], t: int, o: AlgorithmConfig, *, mean_weight: float) -> tuple[float, bool]:
    """(weight, whether the token keeps its policy loss)."""
    token, inside = row[t], [x for x in row if x.mask]
    factor, kept = 1.0, fresh(row, token, o)
    if o.use_opsm:
        drift = sum(x.rollout - x.current for x in inside) / len(inside)
        kept = kept and not (token.advantage < 0 and drift > o.opsm_delta)
    if o.use_tis:
        ratio = math.exp(levelled(row, t, o.tis_level))
        kept = kept and (o.tis_mode != "mask" or o.tis_clip_low <= ratio <= o.tis_clip)
        factor *= bounded(ratio, o) / mean_weight
    if o.use_rs:
        ratio = math.exp(levelled(row, t, o.rs_level))
        upper = o.rs_upper_bound or o.tis_clip
        lower = o.rs_lower_bound or o.tis_clip_low or 1 / upper
        veto = o.rs_veto_threshold
        kept = kept and lower <= ratio <= upper
        kept = kept and (veto is None or all(x.old - x.rollout >= math.log(veto) for x in inside))
    if o.use_decoupled_loss:
        ratio = math.exp(token.old - token.rollout)
        kept = kept and (o.behave_imp_weight_cap is None or ratio <= o.behave_imp_weight_cap)
        factor *= ratio
    return factor, kept


def levelled(row: list[Token], t: int, level: str) -> float:
    differences = [x.old - x.rollout for x in row if x.mask]
    if level == "token":
        return row[t].old - row[t].rollout
    return sum(differences) / (len(differences) if level == "geometric" else 1)


def bounded(ratio: float, o: AlgorithmConfig) -> float:
    if o.tis_mode == "mask":
        return ratio
    return min(max(ratio, o.tis_clip_low if o.tis_mode == "clip" else 0.0), o.tis_clip)


def normalizer(rows: Case, o: AlgorithmConfig) -> float:
    """The mean weight over tokens, or over samples with a token in the loss."""
    weights = [
        [bounded(math.exp(levelled(row, t, o.tis_level)), o) for t, token in enumerate(row) if token.mask]
        for row in rows
    ]
    if o.tis_level == "token":
        return sum(map(sum, weights)) / sum(map(len, weights))
    means = [sum(each) / len(each) for each in weights if each]
    return sum(means) / len(means)


def fresh(row: list[Token], token: Token, o: AlgorithmConfig) -> bool:
    inside = [x.version for x in row if x.mask]
    if o.stale != "train":
        assert o.stale_after is not None
        version = min(inside) if o.stale == "drop" else token.version
        if (STEP - version) * 2 > o.stale_after:
            return False
    return not o.mask_offpolicy_in_partial_rollout or token.version == max(inside)


def frozen(case: Case, moved: Case, o: AlgorithmConfig) -> float:
    """The loss of `moved` with the weights, masks and old policy of `case`."""
    still = [[token._replace(old=proximal(token, o, old=True)) for token in row] for row in case]
    mean_weight = normalizer(still, o) if o.tis_batch_normalize else 1.0
    loss = 0.0
    for row, row_moved in zip(still, moved, strict=True):
        pairs = zip(row, row_moved, strict=True)
        shifted = [token._replace(current=other.current) for token, other in pairs]
        for t, token in enumerate(row):
            if token.mask:
                factor, kept = correction(row, t, o, mean_weight=mean_weight)
                share = 1 / sum(x.mask for x in row) / len(still)
                if o.advantage_estimator == "cispo":
                    # The clipped ratio is a weight, too.
                    weight = surrogate(row, t, o) / token.current
                    loss += share * factor * kept * weight * shifted[t].current
                else:
                    loss += share * factor * kept * surrogate(shifted, t, o)
    return loss
