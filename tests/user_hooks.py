"""Training hooks as users of slime and Miles bring them: written to the customization page's signatures.

Self-contained (nothing of asyncrl is imported) and loaded by path, as from a user's own repository. The names
of the functions and of the options they read on `args` are those of the references' examples.
"""

# ruff: noqa: ANN001, ANN201, ANN202, ANN003 -- what is brought along is rarely annotated
# mypy: ignore-errors
import math

import torch

DIVISOR = 24.0

# examples/train_infer_mismatch_helper/mis.py


def masked_mean(values, mask):
    return (values * mask).sum() / torch.clamp_min(mask.sum(), 1)


def _level(log_ratio, mask, level):
    if level == "token":
        return log_ratio
    if level == "sequence":
        return (log_ratio * mask).sum().expand_as(log_ratio)
    if level == "geometric":
        return masked_mean(log_ratio, mask).expand_as(log_ratio)
    raise ValueError(f"Invalid importance sampling level: {level}")


def compute_mis_weights_with_cp(
    args,
    *,
    pg_loss,
    train_log_probs,
    rollout_log_probs,
    loss_masks,
    total_lengths,
    response_lengths,
    **kwargs,
):
    upper = args.tis_upper_bound
    lower = args.tis_lower_bound if args.tis_lower_bound is not None else 1.0 / upper
    rs_upper = args.rs_upper_bound if args.rs_upper_bound is not None else upper
    rs_lower = args.rs_lower_bound if args.rs_lower_bound is not None else lower
    weights, masks = [], []
    metrics = {"mis_is_ratio": [], "mis_rs_mask_fraction": [], "mis_log_ratio": []}
    for train, rollout, loss_mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=False):
        mask = loss_mask.clone().float()
        log_ratio = train - rollout
        raw = torch.exp(torch.clamp(_level(log_ratio, mask, args.tis_level), min=-20.0, max=20.0))
        if args.tis_mode == "truncate":
            weight = raw.clamp(0, upper) * mask
        elif args.tis_mode == "clip":
            weight = raw.clamp(lower, upper) * mask
        else:
            weight = raw * mask
            mask = mask * ((raw >= lower) & (raw <= upper)).float()
        if args.use_rs:
            rs = torch.exp(torch.clamp(_level(log_ratio, loss_mask.float(), args.rs_level), -20.0, 20.0))
            mask = mask * ((rs >= rs_lower) & (rs <= rs_upper)).float()
            if args.rs_veto_threshold is not None:
                catastrophic = (log_ratio < math.log(args.rs_veto_threshold)) & loss_mask.bool()
                mask = mask * (~catastrophic.any()).float()
        weights.append(weight)
        masks.append(mask)
        metrics["mis_is_ratio"].append(raw)
        metrics["mis_rs_mask_fraction"].append(1 - mask)
        metrics["mis_log_ratio"].append(log_ratio)
    pg_loss = pg_loss * torch.cat(weights, dim=0).detach()
    packed = {name: torch.cat(values, dim=0) for name, values in metrics.items() if name != "mis_log_ratio"}
    return pg_loss, masks, {**packed, "mis_log_ratio": metrics["mis_log_ratio"]}


def icepop_function(args, *, pg_loss, train_log_probs, rollout_log_probs, **kwargs):
    rollout_log_probs = torch.cat(rollout_log_probs, dim=0)
    old_log_probs = torch.cat(train_log_probs, dim=0)
    ice_ratio = torch.exp(old_log_probs - rollout_log_probs)
    ice_abs = (ice_ratio - 1).abs()
    ice_weight = torch.where(
        (ice_ratio >= args.tis_clip_low) & (ice_ratio <= args.tis_clip),
        ice_ratio,
        torch.zeros_like(ice_ratio),
    )
    ice_clipfrac = (ice_weight != ice_ratio).float()
    metrics = {"tis": ice_ratio.clone().detach(), "tis_clipfrac": ice_clipfrac, "tis_abs": ice_abs}
    return pg_loss * ice_weight, kwargs["loss_masks"], metrics


def rejects_in_place(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    """Zeroes the masks it was handed instead of copies."""
    for train, rollout, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        mask[(train - rollout).abs() > 0.5] = 0
    return pg_loss, loss_masks, {}


# examples/DrGRPO/custom_reducer.py


def get_pg_loss_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    assert not calculate_per_token_loss, "Dr.GRPO reducer divides by a constant"

    def reduce(x):
        return sum(
            (x_i * mask_i).sum() / DIVISOR
            for x_i, mask_i in zip(x.split(response_lengths, dim=0), loss_masks, strict=False)
        )

    return reduce


# A custom loss: PPO's clipped surrogate from logits, as slime's own policy_loss_function


def get_responses(logits, *, args, unconcat_tokens, total_lengths, response_lengths):
    assert logits.size(0) == 1
    assert logits.dtype == torch.float32
    logits = logits.squeeze(0).div(args.rollout_temperature)
    end = 0
    for tokens, total, length in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        end += total
        yield logits[end - length - 1 : end - 1], tokens[-length:]


def policy_loss_function(args, batch, logits, sum_of_sample_mean):
    log_probs, entropy = [], []
    for chunk, targets in get_responses(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    ):
        each = torch.log_softmax(chunk, dim=-1)
        log_probs.append(each.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        entropy.append(-(each.exp() * each).sum(-1))
    log_probs = torch.cat(log_probs, dim=0)
    advantages = torch.cat(batch["advantages"], dim=0)
    old_log_probs = torch.cat(batch["log_probs"], dim=0)
    ppo_kl = old_log_probs - log_probs
    ratio = (-ppo_kl).exp()
    pg_losses1 = -ratio * advantages
    pg_losses2 = -ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high) * advantages
    pg_loss = sum_of_sample_mean(torch.maximum(pg_losses1, pg_losses2))
    pg_clipfrac = sum_of_sample_mean(torch.gt(pg_losses2, pg_losses1).float())
    entropy_loss = sum_of_sample_mean(torch.cat(entropy, dim=0))
    loss = pg_loss - args.entropy_coef * entropy_loss
    if args.use_kl_loss:
        ref_log_probs = torch.cat(batch["ref_log_probs"], dim=0)
        kl_loss = sum_of_sample_mean(log_probs - ref_log_probs)
        loss = loss + args.kl_loss_coef * kl_loss
    reported_loss = {
        "loss": loss.clone().detach(),
        "pg_loss": pg_loss.clone().detach(),
        "entropy_loss": entropy_loss.clone().detach(),
        "pg_clipfrac": pg_clipfrac.clone().detach(),
        "ppo_kl": sum_of_sample_mean(ppo_kl).clone().detach(),
    }
    return loss, reported_loss


# A custom advantage function (slime): reward plus a length-shaped return, with the KL of the reward


def compute_advantages(args, rollout_data):
    rewards, kl, masks = rollout_data["rewards"], rollout_data["kl"], rollout_data["loss_masks"]
    advantages, returns = [], []
    for reward, kl_i, mask in zip(rewards, kl, masks, strict=True):
        token_rewards = -args.kl_coef * kl_i
        last = mask.nonzero(as_tuple=True)[0]
        if len(last):
            token_rewards[last[-1]] += reward
        reversed_returns, running = [], 0.0
        for value in reversed(token_rewards.tolist()):
            running = value + args.gamma * running
            reversed_returns.append(running)
        returns.append(torch.tensor(reversed_returns[::-1], dtype=torch.float32))
    advantages = [each.clone() for each in returns]
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = returns


# Reward post-processing


def group_normalise(args, samples):
    raw_rewards = [sample.get_reward_value(args) for sample in samples]
    groups = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.group_index, []).append(place)
    rewards = [0.0] * len(samples)
    for places in groups.values():
        assert len(places) == args.n_samples_per_prompt
        group = torch.tensor([raw_rewards[place] for place in places], dtype=torch.float)
        group = group - group.mean()
        if args.grpo_std_normalization:
            group = group / (group.std() + 1e-6)
        for place, reward in zip(places, group.tolist(), strict=True):
            rewards[place] = reward
    return raw_rewards, rewards


# Samples to training data


def convert_samples_to_train_data(args, samples):
    raw_rewards, rewards = group_normalise(args, samples)
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": raw_rewards,
        "truncated": [1 if sample.status == sample.Status.TRUNCATED else 0 for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [
            [0] * sample.response_length if sample.remove_sample else sample.loss_mask for sample in samples
        ],
        "round_number": [sample.metadata.get("round_number", 1) for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "metadata": [sample.train_metadata for sample in samples],
        "multimodal_train_inputs": [None for _ in samples],
    }


def convert_turns(args, samples):
    """Answers of more than four tokens become two samples: the first half, and the rest after it."""
    _, rewards = group_normalise(args, samples)
    data = {key: [] for key in ("tokens", "response_lengths", "rewards", "loss_masks", "sample_indices")}
    for sample, reward in zip(samples, rewards, strict=True):
        start = len(sample.tokens) - sample.response_length
        half = sample.response_length // 2 if sample.response_length > 4 else sample.response_length
        for begin, end in ((0, half), (half, sample.response_length)):
            if begin < end:
                data["tokens"].append(sample.tokens[: start + end])
                data["response_lengths"].append(end - begin)
                data["rewards"].append(reward)
                data["loss_masks"].append(sample.loss_mask[begin:end])
                data["sample_indices"].append(sample.index)
    return data


# After log-probs


def mask_by_log_probs(args, rollout_id, rollout_data):
    """In place: tokens far from the engine's log-probs leave the loss."""
    for mask, train, rollout in zip(
        rollout_data["loss_masks"], rollout_data["log_probs"], rollout_data["rollout_log_probs"], strict=True
    ):
        mask[(train - rollout).abs() > args.max_log_prob_diff] = 0


def mask_samples(args, samples):
    """The same on samples."""
    for group in samples:
        for sample in group:
            sample.loss_mask = [
                mask * int(abs(train - rollout) <= args.max_log_prob_diff)
                for mask, train, rollout in zip(
                    sample.loss_mask, sample.log_probs, sample.rollout_log_probs, strict=True
                )
            ]


def remember_args(args):
    args.seen_postprocess = getattr(args, "seen_postprocess", 0) + 1


# Around Megatron's passes and steps


def before_log_prob(args, model, store_prefix):
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    args.log_prob_calls = [*getattr(args, "log_prob_calls", []), (store_prefix, num_parameters)]


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    lr = optimizer.param_groups[0]["lr"]
    args.train_step_calls = [
        *getattr(args, "train_step_calls", []),
        (rollout_id, step_id, len(gradients), lr, opt_param_scheduler.lr, opt_param_scheduler.num_steps),
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-args.weight_clip, args.weight_clip)


def keep_log_probs(args, rollout_id, rollout_data):
    """For inspection later."""
    args.kept = [rollout_data[key] for key in ("loss_masks", "log_probs", "rollout_log_probs")]
