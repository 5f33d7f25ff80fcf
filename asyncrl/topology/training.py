"""The table [trainer] of a topology file: the model, its optimizer, batches and checkpoints.

See `schema` for the rules of names and defaults, and `algorithm` for the other table about training.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asyncrl.topology.algorithm import AlgorithmConfig

__all__ = ["AlgorithmConfig", "TrainerConfig"]


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
    ref_update_interval: int | None = None
    """Rollout steps after which the reference becomes a copy of the actor, again and again. None: never."""
    load: str | None = None
    """Checkpoint directory of another run to start from: weights, optimizer, critic and the schedule's
    position (`asyncrl launch --resume RUN` continues the same run instead). None: `hf_checkpoint`, at step
    0."""
    no_load_optim: bool = False
    """Take only the weights from `load`: a fresh optimizer, and the schedule starts at 0."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Take the options of the learning rate's schedule from the checkpoint, whatever this file says
    (Megatron). With neither this nor override_opt_param_scheduler, the two must agree."""
    override_opt_param_scheduler: bool = False
    """Take the options of the schedule from this file, whatever the checkpoint says (Megatron)."""
    num_threads: int = 1
    """Threads torch may use; recorded, and pinned again by `asyncrl replay`."""
    device: str = "cpu"
    """torch device of the trainer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in training (Miles: --bf16, --fp16)."""
    main_params_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that the optimizer updates when dtype = "bfloat16": "float32" keeps a master copy,
    "bfloat16" updates the weights themselves."""
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
    log_probs_max_tokens_per_gpu: int | None = None
    """Tokens per micro-batch of passes without gradient (old, reference, teacher). None:
    `max_tokens_per_gpu`."""
    balance_data: bool = False
    """Deal a step's samples to ranks so that their tokens are even (largest differencing, Karmarkar-Karp)."""
    balance_by_flops: bool = False
    """balance_data by the estimated work of a sample, attention included, instead of its tokens."""
    use_dynamic_global_batch_size: bool = False
    """Train all samples of a rollout step even where filters or hooks changed their number: the samples per
    optimizer step follow from num_steps_per_rollout. Off: another number than global_batch_size x
    num_steps_per_rollout is an error."""
    data_pad_size_multiplier: int = 1
    """Pad a micro-batch to a multiple of this many tokens."""
    attn_implementation: Literal["packed", "sdpa", "eager"] = "packed"
    """"packed": sequences of a micro-batch end to end, attention looped over them; the others pad."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    use_routing_replay: bool = False
    """R2, for mixtures of experts (arXiv:2507.18071): training passes use the experts that the pass for the
    old log-probs chose."""
    use_rollout_routing_replay: bool = False
    """R3 (arXiv:2510.11370): all passes of the trainer use the experts that the engine chose; implies
    use_routing_replay."""
    log_probs_chunk_size: int = -1
    """Tokens whose logits are held at once; -1: all of a micro-batch."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """"adam" is AdamW."""
    lr: float = 1e-6
    """Learning rate of the actor."""
    min_lr: float = 0.0
    """Where decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "constant"
    """Schedule after warm-up (Miles: constant under FSDP, linear under Megatron). "WSD": constant, then a
    decay of lr_wsd_decay_iters at the end."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of lr_decay_iters, instead of lr_warmup_iters. None: lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first warm-up step."""
    lr_decay_iters: int | None = None
    """Optimizer steps until `min_lr`. None: all of the run."""
    lr_wsd_decay_iters: int | None = None
    """Optimizer steps of the decay that ends lr_decay_style = "WSD"; required by it."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of that decay, with x from 0 to 1 through it: (2 x 0.5^x) - 1, 1 - x, (1 + cos(pi x)) / 2 or
    1 - sqrt(x) of the way from min_lr to lr (Megatron)."""
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
    reset_optimizer_states: bool = False
    """Forget the optimizer's moments at the start of every rollout step; the schedule goes on."""
    keep_old_actor: bool = False
    """Compute old log-probs with a copy of the weights that the generators last got, instead of those at the
    start of the rollout step: the policy that sampled most of the batch."""
    critic_load: str | None = None
    """Model directory that the critic of ppo starts from; its value head starts at 0 where there is none.
    None: `hf_checkpoint` (Miles: --load)."""
    critic_lr: float | None = None
    """Learning rate of the critic. None: `lr`."""
    critic_lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up of the critic."""
    num_critic_only_steps: int = 0
    """First rollout steps in which only the critic is trained."""
    on_nan: Literal["fail", "skip"] = "fail"
    """NaN or Inf in a loss or a gradient: stop with a named error, or skip that optimizer step and
    count it."""
    save_interval: int | None = None
    """Rollout steps between checkpoints. None: only at the end (and when drained)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk; the last step's always does."""
    prefetch_batches: int = 1
    """Batches fetched and packed while another one trains."""
