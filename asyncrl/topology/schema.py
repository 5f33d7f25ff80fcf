"""The tables of a topology file that describe the run, its data and its workers.

One frozen struct per table; the string under a field is its documentation, which `asyncrl explain` prints.
Names are slime's and Miles' flags in snake case with their defaults wherever the option exists there; where
the two differ, Miles wins and the text says so. `training` holds the trainer's and the algorithm's tables.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.training import TrainerConfig


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table: frozen, and a key it does not know is an error (a typo must not be a default)."""


class RunConfig(Table, frozen=True, kw_only=True):
    """[run]: what the job is called, where it keeps its records, how long it goes on."""

    name: str = "run"
    """Name of the run directory below `dir`. A directory that exists is refused unless `--resume` names it;
    a trailing "-%" is replaced by the next free number."""
    dir: str = "runs"
    """Where run directories are made; relative to the working directory."""
    address: str = "tcp://127.0.0.1:0"
    """Where the supervisor listens for `attach`, `detach` and `status`; port 0 takes a free one. An address
    other hosts can reach needs `key`."""
    buffer_address: str = ""
    """Where the buffer listens. Empty: a free port on the host of `address`."""
    publisher_address: str = ""
    """Where the trainer's publisher listens for machines that cannot map its files. Empty: a free port on
    the host of `address`."""
    key: str | None = None
    """CURVE key file made by `asyncrl keys`. None: only ipc and loopback addresses are allowed."""
    seed: int = 1234
    """Seed of the trainer's random numbers, and of initial weights where a model is made."""
    num_rollout: int | None = None
    """Rollout steps to train. None: computed from `source.num_epoch`. When both are set, this one wins."""
    heartbeat_s: float = 1.0
    """Every process reports this often: after three reports that did not come it is a suspect, after
    `dead_after_s` of silence a worker loses its leases. Seconds."""
    dead_after_s: float = 5.0
    """Silence after which a worker counts as dead: its leases go to others, and where the run started the
    process it is killed and started again. Seconds."""
    stall_s: float = 300.0
    """No rollout step for so long stops the run with a report of who waits for what. Seconds."""
    max_restarts: int = 5
    """How often the supervisor starts one process again before the run fails. The wait before each doubles
    from 0.2 s up to 30 s. What does not count: a process that was killed for being slow, deaths that were a
    sample's doing (it ended a worker again when it was leased alone), and deaths before a life that was
    healthy for `restart_window_s`. Finding such a sample takes `rollout.max_attempts` deaths, so keep it at
    least as large."""
    restart_window_s: float = 600.0
    """A process that was healthy for so long may be started `max_restarts` times again. Seconds."""
    slow_after_s: float | None = None
    """A generator that is slow for so long (against the median of the others: tokens per second, or loading
    weights; or its event loop stands still again and again) is killed and started again. None: it is shown
    as a suspect and left alone. Seconds."""
    max_slow_kills: float = 0.25
    """At most this share of the generators (but at least one) is killed for being slow within
    `restart_window_s`. When more are slow, the cause is one that they share, and none is killed."""
    custom_config_path: str | None = None
    """YAML whose keys become attributes of the `args` that hooks receive (slime: --custom-config-path)."""


class SourceConfig(Table, frozen=True, kw_only=True):
    """[source]: where prompts come from."""

    prompt_data: str | None = None
    """JSONL file of prompts, one object per line. Needed unless `data_source_path` is set."""
    input_key: str = "input"
    """Key of the prompt: a string, or a list of OpenAI messages."""
    label_key: str | None = None
    """Key of the ground truth. When set, a line without it is a bad line."""
    metadata_key: str = "metadata"
    """Key of an object handed to rewards and hooks; may be missing from a line."""
    tool_key: str = "tools"
    """Key of tool definitions for the chat template (Miles' default; slime has none)."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template; a string prompt becomes one user message."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as {enable_thinking = false}."""
    rollout_max_prompt_len: int | None = None
    """Longer prompts (in tokens) are left out and counted. None: no limit."""
    rollout_shuffle: bool = False
    """Shuffle the prompts of every epoch; the order is a function of `rollout_seed` and the epoch."""
    rollout_seed: int = 42
    """Seed of shuffling and of sampling."""
    num_epoch: int | None = None
    """Passes over the data. Ignored when `run.num_rollout` is set."""
    data_source_path: str | None = None
    """A class of yours instead of the JSONL reader, with slime's interface (get_samples, add_samples, save,
    load): "package.module:Class"."""
    on_bad_line: Literal["fail", "skip"] = "fail"
    """What a malformed line does: stop before anything starts, or be counted and left out."""


class RolloutConfig(Table, frozen=True, kw_only=True):
    """[rollout]: how much is sampled, how, and how far generation may run ahead."""

    rollout_batch_size: int
    """Prompts (groups) per rollout step, B. Required."""
    n_samples_per_prompt: int = 1
    """Answers per prompt."""
    rollout_temperature: float = 1.0
    """Sampling temperature; the trainer's log-probs are scaled by it too. Above 0."""
    rollout_top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    rollout_top_k: int = -1
    """Top-k sampling; -1 is off."""
    rollout_max_response_len: int = 1024
    """Longest answer in tokens (slime's default; Miles has none and then leaves it to the engine)."""
    rollout_min_new_tokens: int = 0
    """No answer ends before so many tokens."""
    rollout_max_context_len: int | None = None
    """Prompt and answer together, in tokens. None: the model's max_position_embeddings."""
    rollout_stop: list[str] = []
    """Strings that end an answer."""
    rollout_stop_token_ids: list[int] = []
    """Token ids that end an answer, beside the model's own."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the decoded answer that rewards see."""
    max_staleness: int = 1
    """How many rollout steps old the oldest token of a trained sample may be (eta). 0 is exactly
    on-policy: generation and training take turns. Miles' --max-weight-staleness throws old samples away;
    asyncrl admits no work that would become too old."""
    update_weights_interval: int = 1
    """Rollout steps between pushes of weights to the generators, k. `max_staleness + 1 >= k` is needed."""
    on_straggler: Literal["wait", "drop", "train"] = "wait"
    """When a group that is due has not finished: "wait" holds the batch back; "drop" settles the group as
    stale (this biases training against long answers); "train" lets it through late (this breaks the
    staleness bound for that group)."""
    over_sampling_batch_size: int | None = None
    """Groups kept outstanding per rollout step instead of `rollout_batch_size`; the surplus settles as
    `surplus`. Needs on_straggler = "drop". None: no over-sampling."""
    partial_rollout: bool = True
    """Answers interrupted by a push (`on_new_weights = "abort"`), a drain or a death are resumed from their
    tokens. Off: they start again (slime's and Miles' default)."""
    dynamic_sampling_filter_path: str | None = None
    """Function (args, samples, **kwargs) -> bool or object with .keep and .reason: a group it refuses is
    settled as `filtered` and replaced."""
    rollout_sample_filter_path: str | None = None
    """Function (args, groups) that sets sample.remove_sample on samples to be kept out of the loss."""
    buffer_filter_path: str | None = None
    """Function (args, rollout_id, buffer, num_samples) that chooses which ready groups a batch may take. It
    is run on each complete group by a reward worker: returning no group refuses it."""
    max_refused_per_step: int | None = None
    """Groups the filters may refuse without a batch being cut before the run fails by name. None: 10 x
    rollout_batch_size."""
    custom_generate_function_path: str | None = None
    """Coroutine (args, sample, sampling_params) -> sample that replaces one answer's generation."""
    max_attempts: int = 3
    """Attempts at generating or scoring a sample that make no progress before its group settles as failed."""
    progress_every_tokens: int = 256
    """A generator's death costs at most this many tokens of a running answer, which is handed in for
    safe-keeping at half of it. Tokens."""
    progress_every_s: float = 10.0
    """The same by time, whichever is due first: a death costs at most what was sampled in so many seconds,
    handed in at half of it. 0: by tokens alone. Seconds."""


class GeneratorConfig(Table, frozen=True, kw_only=True):
    """[[generator]]: one or more processes that sample answers."""

    name: str = "generator"
    """Base name; with `replicas` above 1 the processes are NAME-0, NAME-1, ..."""
    replicas: int = 1
    """Processes made from this table."""
    engine: str = "embedded"
    """"embedded" (torch, in the process) or "scripted" (no model: for tests, dry runs and benchmarks)."""
    concurrency: int = 64
    """Samples in work at once; the credit the process gives the buffer (Miles: sglang_server_concurrency)."""
    max_bytes: int = 64 * 1024 * 1024
    """Bytes of leases in flight; the other half of the credit."""
    on_new_weights: Literal["finish", "abort", "recompute", "keep"] = "recompute"
    """What a push does to running answers (Miles' --pause-generation-mode: retract = "recompute", in_place =
    "keep", abort = "abort"; "finish" has no counterpart there)."""
    num_threads: int = 1
    """Threads torch may use in the process."""
    scripted: dict[str, Any] = {}
    """Parameters of the scripted engine (length and latency distributions); see engines/scripted.py."""


class RewardConfig(Table, frozen=True, kw_only=True):
    """[[reward]]: one or more processes that score answers."""

    name: str = "reward"
    """Base name; with `replicas` above 1 the processes are NAME-0, NAME-1, ..."""
    replicas: int = 1
    """Processes made from this table."""
    use: str = "math"
    """A built-in (Miles' --rm-type names: math, exact, random, remote_rm, ..., and none, which is 0 for every
    answer) or a function of yours, "package.module:function" with (sample) or (args, sample) (slime:
    --custom-rm-path)."""
    rm_url: str | None = None
    """Where `remote_rm` posts {prompt, response, label}."""
    teacher_url: str | None = None
    """Address of an SGLang server with a teacher of the same vocabulary, "http://HOST:PORT": beside its
    reward, every sample of training gets that model's log-probs of its answer, for algorithm.opd_type =
    "engine". With use = "none" the teacher is all there is to learn from; a reward function of yours may set
    sample.teacher_log_probs itself, and what it sets stands. Asking, retries included, has `timeout_s`.
    SGLang gives log-probs at temperature 1, so rollout_temperature = 1 compares like with like. (slime: the
    --rm-url of its distillation example)"""
    reward_key: str | None = None
    """Key of the number when the reward is a dict."""
    eval_reward_key: str | None = None
    """The same for evaluation. None: `reward_key`."""
    group_rm: bool = False
    """Score whole groups with one call: the function takes a list and returns a list."""
    timeout_s: float = 30.0
    """A call that takes longer is killed and named as that sample's failure. Seconds."""
    concurrency: int = 2
    """Child processes that run the function."""
    batch: int = 64
    """Samples leased at once; the credit the process gives the buffer."""


class BufferConfig(Table, frozen=True, kw_only=True):
    """[buffer]: the one desk where every sample rests."""

    keep: Literal["checkpoint", "all"] = "all"
    """Which recorded bodies stay on disk: what the oldest kept checkpoint needs, or everything (which lets
    `asyncrl replay` start at step 0)."""
    window_bytes: int = 64 * 1024 * 1024
    """Bytes of batches in flight to the trainer, and of results a worker may have unacknowledged."""
    segment_bytes: int = 256 * 1024 * 1024
    """Bodies go to append-only files of about this size."""
    min_free_bytes: int = 256 * 1024 * 1024
    """Leasing stops while the disk has less free space than this."""
    eval_share: float = 0.5
    """Share of a generator's slots that evaluation may take while training work waits."""


class EvalConfig(Table, frozen=True, kw_only=True):
    """[eval]: held-out accuracy, in the lane that trains nothing."""

    eval_prompt_data: list[str] = []
    """Name and path pairs: ["aime", "/data/aime.jsonl"]; a single path gets its file's name."""
    eval_interval: int | None = None
    """Rollout steps between evaluations. None: only before training and at the end. An evaluation is of the
    first version that generators are told to serve at or after each multiple: where some were published
    while another was evaluated, or while the buffer was away, only the newest of them is served."""
    skip_eval_before_train: bool = False
    """Leave out the evaluation of the initial model."""
    n_samples_per_eval_prompt: int = 1
    """Answers per held-out prompt."""
    eval_temperature: float | None = None
    """Sampling temperature; 0 is greedy. None: `rollout_temperature`."""
    eval_top_p: float | None = None
    """None: `rollout_top_p`."""
    eval_top_k: int | None = None
    """None: `rollout_top_k`."""
    eval_max_response_len: int | None = None
    """None: `rollout_max_response_len`."""
    eval_input_key: str | None = None
    """None: `source.input_key`."""
    eval_label_key: str | None = None
    """None: `source.label_key`."""
    verify_export: bool = True
    """At the end, take the accuracy again from the exported checkpoint with plain transformers generate."""
    min_final_accuracy: float | None = None
    """The run fails (exit 1) when the last evaluation's mean reward is below this. None: no such check."""


class WeightsConfig(Table, frozen=True, kw_only=True):
    """[weights]: how versions reach the generators."""

    carrier: Literal["auto", "shm", "stream"] = "auto"
    """"shm": a mapped file, for processes of one host; "stream": chunks over the network; "auto": shm where
    the file can be mapped, else stream."""
    directory: str | None = None
    """Where published versions are written. None: /dev/shm when it is there, else the run directory."""
    push_timeout_s: float = 60.0
    """A generator that has not loaded an announced version by then is reported, and fails. Seconds."""


class Topology(Table, frozen=True, kw_only=True):
    """A whole topology file."""

    rollout: RolloutConfig
    """How much is sampled, how, and how far generation may run ahead."""
    trainer: TrainerConfig
    """The model, its optimizer, checkpoints."""
    run: RunConfig = RunConfig()
    """Name, place and length of the job."""
    source: SourceConfig = SourceConfig()
    """Where prompts come from."""
    generator: list[GeneratorConfig] = msgspec.field(default_factory=lambda: [GeneratorConfig()])
    """Processes that sample answers."""
    reward: list[RewardConfig] = msgspec.field(default_factory=lambda: [RewardConfig()])
    """Processes that score answers."""
    buffer: BufferConfig = BufferConfig()
    """The desk."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Advantages, loss and corrections."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    weights: WeightsConfig = WeightsConfig()
    """How versions travel."""
