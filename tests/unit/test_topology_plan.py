"""What a topology compiles to, and what is refused with which words."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.topology import batch, words
from asyncrl.topology.plan import Plan, with_prompts
from asyncrl.topology.ranges import RANGES
from tests.support.topologies import compiled, refused, topology


def test_tickets_are_the_staleness_bound_in_groups() -> None:
    assert compiled().tickets == 96
    assert compiled("max_staleness=0").tickets == 32
    assert compiled("over_sampling_batch_size=40", "on_straggler=drop").tickets == 120


def test_a_plan_survives_the_trip_through_json() -> None:
    plan = compiled("generator.replicas=2")
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_processes_start_in_order_with_unique_names() -> None:
    plan = compiled("generator.replicas=2", "reward.replicas=2", 'eval_prompt_data=["held.jsonl"]')
    assert [process.name for process in plan.processes] == [
        "buffer",
        "source",
        "trainer",
        "reward-0",
        "reward-1",
        "generator-0",
        "generator-1",
    ]
    assert plan.processes[1].roles == ["source", "evaluator"]
    assert plan.processes[-1].index == 0
    assert plan.max_concurrency == 128


def test_threads_of_a_process_are_those_of_its_table() -> None:
    env = {process.name: process.env for process in compiled("trainer.num_threads=3").processes}
    assert env["trainer"]["OMP_NUM_THREADS"] == "3"
    assert env["generator"]["OMP_NUM_THREADS"] == "1"


def test_what_follows_from_other_options_is_filled_in() -> None:
    plan = compiled("rollout.rollout_temperature=0.7", "eps_clip=0.3", "label_key=answer", "reward_key=score")
    resolved = plan.topology
    assert (resolved.trainer.global_batch_size, resolved.trainer.num_steps_per_rollout) == (256, 1)
    assert resolved.algorithm.eps_clip_high == 0.3
    assert (resolved.eval.eval_temperature, resolved.eval.eval_label_key) == (0.7, "answer")
    assert resolved.reward[0].eval_reward_key == "score"


def test_an_evaluation_temperature_of_zero_is_not_inherited() -> None:
    assert compiled("eval_temperature=0").topology.eval.eval_temperature == 0


@given(st.integers(1, 64), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 2000)))
def test_the_four_knobs_balance_or_are_refused(groups: int, samples: int, size: int | None) -> None:
    overrides = [f"rollout_batch_size={groups}", f"n_samples_per_prompt={samples}"]
    overrides += [f"global_batch_size={size}"] if size else []
    solved = batch.solve(topology(*overrides))
    if isinstance(solved, str):
        assert size is not None
        assert groups * samples % size
    else:
        assert solved.global_batch_size * solved.num_steps_per_rollout == groups * samples


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["global_batch_size=100", "num_steps_per_rollout=2"],
            (
                "trainer.global_batch_size: rollout_batch_size x n_samples_per_prompt = 32 x 8 = 256, but "
                "global_batch_size x num_steps_per_rollout = 100 x 2 = 200; set global_batch_size = 128, or "
                "leave one of the two out"
            ),
        ),
        (
            ["global_batch_size=100"],
            (
                "trainer.global_batch_size: rollout_batch_size x n_samples_per_prompt = 32 x 8 = 256 cannot "
                "be divided by global_batch_size = 100; the nearest values that divide it: 64 or 128"
            ),
        ),
        (
            ["max_staleness=0", "update_weights_interval=3"],
            (
                "rollout.max_staleness: tickets cannot feed the trainer: (max_staleness + 1) x B = (0 + 1) x "
                "32 = 32 < update_weights_interval x B = 3 x 32 = 96; set max_staleness to at least 2, or "
                "update_weights_interval to at most 1"
            ),
        ),
        (
            ["generator.engine=vllm"],
            (
                'generator "generator".engine: unknown engine "vllm"; known: embedded, scripted '
                "(sglang comes later)"
            ),
        ),
        (["rollout_temperature=0"], "rollout.rollout_temperature: given 0.0; allowed: above 0"),
        (["reward.replicas=0"], 'reward "reward".replicas: given 0; allowed: at least 1'),
        (["progress_every_tokens=1"], "rollout.progress_every_tokens: given 1; allowed: at least 2"),
        (["save_interval=0"], "trainer.save_interval: given 0; allowed: at least 1"),
    ],
)
def test_a_problem_is_told_whole(overrides: list[str], expected: str) -> None:
    assert refused(*overrides) == [expected]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["over_sampling_batch_size=40"], 'needs on_straggler = "drop"'),
        (["over_sampling_batch_size=8", "on_straggler=drop"], "at least rollout_batch_size = 32"),
        (["use_tis=true", "use_rollout_logprobs=true"], "exclusive with use_rollout_logprobs"),
        (["kl_loss_coef=0.1"], "no effect without use_kl_loss"),
        (["n_samples_per_prompt=1"], "every advantage is 0"),
        (["tis_clip_low=2"], "below tis_clip = 2"),
        (["eps_clip=0"], "algorithm.eps_clip: given 0.0"),
        (["eps_clip_c=1"], "algorithm.eps_clip_c: given 1.0; allowed: above 1"),
        (["prompt_data=none"], "source.prompt_data: required"),
        (["num_rollout=none"], "neither run.num_rollout nor source.num_epoch"),
        (["eval_interval=2"], "nothing to evaluate on"),
        (['eval_prompt_data=["a", "b", "c"]'], "name and path pairs"),
        (["reward.use=remote_rm"], "rm_url: required"),
        (["reward.use=mth"], 'unknown reward "mth" (close to it: math)'),
        (["reward.use=dapo"], "not built in yet"),
        (["generator.name=buffer"], "reserved"),
        (["generator.name=reward"], 'a second process would be called "reward"'),
        (["generator.name=a/b"], "allowed: letters"),
        (["run.address=tcp://0.0.0.0:7777"], "run.key is not set"),
        (["run.buffer_address=tcp://10.0.0.1:7777"], "run.buffer_address: other hosts can reach"),
        (["run.address=localhost:70"], 'allowed: "tcp://HOST:PORT"'),
        (["use_dynamic_batch_size=false", "micro_batch_size=7"], "a divisor of global_batch_size = 256"),
        (["rollout_max_context_len=1024"], "cannot fit rollout_max_context_len = 1024"),
        (["rollout_max_context_len=1200", "rollout_max_prompt_len=512"], "allowed: at most 688"),
        (["dead_after_s=0.5"], "above heartbeat_s = 1"),
        (["trainer.device=gpu"], "trainer.device"),
        (["progress_every_tokens=2", "rollout_max_response_len=4096"], "comes in 32776 pieces"),
        (["progress_every_tokens=5", "rollout_max_response_len=4096"], "comes in 16392 pieces"),
    ],
)
def test_options_at_odds_are_refused_by_name(overrides: list[str], words: str) -> None:
    (found,) = refused(*overrides)
    assert words in found


def test_all_cross_field_problems_are_reported_at_once() -> None:
    found = refused(
        "use_tis=true", "use_rollout_logprobs=true", "global_batch_size=100", "run.num_rollout=none"
    )
    assert [problem.split(":")[0] for problem in found] == [
        "trainer.global_batch_size",
        "run.num_rollout",
        "algorithm.use_tis",
    ]


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:0", "tcp://localhost:80", "tcp://[::1]:0", "ipc:///tmp/x"]
)
def test_private_addresses_need_no_key(address: str) -> None:
    assert compiled(f"run.address={address}").topology.run.address == address


def test_any_address_will_do_with_a_key() -> None:
    assert compiled("run.address=tcp://0.0.0.0:7777", "run.key=k").topology.run.key == "k"


def test_epochs_become_rollout_steps_when_the_prompts_are_counted() -> None:
    plan = compiled("num_rollout=none", "num_epoch=3")
    assert plan.num_rollout is None
    assert with_prompts(plan, 50).num_rollout == 4
    assert with_prompts(compiled("num_epoch=3"), 50).num_rollout == 10, "num_rollout wins"
    partial = compiled("num_rollout=none", "num_epoch=3", "allow_partial_train_step=true")
    assert with_prompts(partial, 50).num_rollout == 5
    with pytest.raises(ConfigError, match="do not fill one rollout step"):
        with_prompts(plan, 5)


def test_the_schedule_is_told_in_words() -> None:
    told = words.schedule_in_words(compiled("update_weights_interval=2", "num_steps_per_rollout=4"))
    assert "a sample may be up to 2 rollout steps (11 optimizer steps) old when it is trained" in told
    assert any(line.startswith("weights are pushed every 2 rollout steps") for line in told)
    assert "up to 96 groups (768 samples) are outstanding" in told
    synchronous = words.schedule_in_words(compiled("max_staleness=0"))
    assert any("take turns" in line for line in synchronous)


def test_the_price_of_the_bound_falls_with_the_bound() -> None:
    shares = [dict(words.tail_table(compiled(f"max_staleness={eta}")))[8] for eta in (0, 2, 8)]
    assert shares == [1 / 9, 3 / 9, 1.0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["max_staleness=1", "update_weights_interval=2"], "generation idles"),
        (["rollout_batch_size=1", "generator.concurrency=64"], "40 slots stay empty"),
        (["use_tis=false"], "no correction is on"),
        (["max_tokens_per_gpu=100"], "less than the longest sample"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(overrides: list[str], expected: str) -> None:
    assert any(expected in line for line in words.warnings(compiled(*overrides)))


def test_a_sound_topology_has_no_warnings() -> None:
    assert words.warnings(compiled("use_tis=true")) == []


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_range_lets_a_number_outside_it_in(value: float) -> None:
    for allowed in RANGES.values():
        if value in allowed:
            assert allowed.low <= value <= allowed.high
