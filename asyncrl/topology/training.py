"""The tables of a topology file that describe training: [trainer] and [algorithm].

See `schema` for the rules of names and defaults.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class TrainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[trainer]: the model, its optimizer, micro-batches and checkpoints."""

    hf_checkpoint: str
    """Hugging Face model directory: initial weights, configuration and tokenizer. Required."""
    backend: Literal["torch", "scripted"] = "torch"
    """What trains: "torch" runs any transformers causal LM in one process (Miles: --train-backend);
    "scripted" trains nothing and takes `scripted_step_s` for it: for tests, dry runs and benchmarks."""
    scripted_step_s: float = 0.0
    """Seconds that a rollout step takes under backend = "scripted"; the others ignore it."""
    ref_load: str | None = None
    """Directory of the reference model for the KL loss. None: `hf_checkpoint`."""
    num_threads: int = 1
    """Threads torch may use; recorded, and pinned again by `asyncrl replay`."""
    device: str = "cpu"
    """torch device of the trainer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in training."""
    deterministic: bool = True
    """Only deterministic kernels, so that a recorded batch trains to the same bits (Miles:
    --deterministic-mode, default off there; asyncrl's replay and recovery rest on it)."""
    global_batch_size: int | None = None
    """Samples per optimizer step. None: from the four-knob invariant rollout_batch_size x
    n_samples_per_prompt = global_batch_size x num_steps_per_rollout."""
    num_steps_per_rollout: int | None = None
    """Optimizer steps per rollout step. None: from the invariant (1 when both are left out)."""
    allow_partial_train_step: bool = False
    """Train the remainder at the end of the data as a smaller batch instead of settling it as unneeded."""
    use_dynamic_batch_size: bool = True
    """Pack samples into micro-batches by `max_tokens_per_gpu`. slime and Miles default to off; packing by
    tokens is what fits answers of unequal length."""
    max_tokens_per_gpu: int | None = None
    """Tokens (prompt and answer) per micro-batch. None: 8192. A longer sample sits alone."""
    micro_batch_size: int = 1
    """Samples per micro-batch when use_dynamic_batch_size is off."""
    attn_implementation: Literal["packed", "sdpa", "eager"] = "packed"
    """"packed": sequences of a micro-batch end to end, attention looped over them; the others pad."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    log_probs_chunk_size: int = -1
    """Tokens whose logits are held at once; -1: all of a micro-batch."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """"adam" is AdamW."""
    lr: float = 1e-6
    """Learning rate of the actor."""
    min_lr: float = 0.0
    """Where decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after warm-up (Miles: constant under FSDP, linear under Megatron)."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first warm-up step."""
    lr_decay_iters: int | None = None
    """Optimizer steps until `min_lr`. None: all of the run."""
    adam_beta1: float = 0.9
    """Beta1 of Adam."""
    adam_beta2: float = 0.95
    """Beta2 of Adam (Miles; slime leaves Megatron's 0.999)."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 is off."""
    on_nan: Literal["fail", "skip"] = "fail"
    """NaN or Inf in a loss or a gradient: stop with a named error, or skip that optimizer step and
    count it."""
    save_interval: int | None = None
    """Rollout steps between checkpoints. None: only at the end (and when drained)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk; the last step's always does."""
    prefetch_batches: int = 1
    """Batches fetched and packed while another one trains."""


class AlgorithmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[algorithm]: advantages, loss and off-policy corrections."""

    advantage_estimator: Literal["grpo"] = "grpo"
    """How rewards become advantages. "grpo": (reward - group mean) / (group std + 1e-6), for every token."""
    grpo_std_normalization: bool = True
    """Divide by the group's standard deviation (off: Dr.GRPO). Miles: --disable-grpo-std-normalization."""
    rewards_normalization: bool = True
    """Subtract the group's mean. Miles: --disable-rewards-normalization."""
    loss_type: Literal["policy_loss"] = "policy_loss"
    """The PPO clipped surrogate."""
    eps_clip: float = 0.2
    """PPO clip range below 1."""
    eps_clip_high: float | None = None
    """PPO clip range above 1. None: `eps_clip`."""
    eps_clip_c: float | None = None
    """Dual-clip bound c > 1 for negative advantages (arXiv:1912.09729). None: off."""
    calculate_per_token_loss: bool = False
    """Average over all tokens of the step, instead of over samples of each sample's mean."""
    use_kl_loss: bool = False
    """Add a KL term against the frozen reference to the loss."""
    kl_loss_coef: float = 0.0
    """Weight of the KL term."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL term."""
    use_unbiased_kl: bool = False
    """Weigh the KL term by the importance ratio, gradient included (DeepSeek-V3.2)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old policy in the PPO ratio, instead of recomputing them with the
    trainer's weights at the start of the rollout step. Exclusive with `use_tis`."""
    use_tis: bool = False
    """Token-level truncated importance sampling: weigh each token's loss by
    clamp(exp(old - rollout log-prob), tis_clip_low, tis_clip), without gradient."""
    tis_clip: float = 2.0
    """Upper bound of the TIS weight."""
    tis_clip_low: float = 0.0
    """Lower bound of the TIS weight."""
    use_opsm: bool = False
    """Off-policy sequence masking: a sequence with negative advantage whose mean (rollout - current) log-prob
    exceeds `opsm_delta` gives no policy gradient (DeepSeek-V3.2)."""
    opsm_delta: float = 1e-4
    """Threshold of OPSM (Miles' default; 0.05-0.2 is what others found reasonable under engine mismatch)."""
