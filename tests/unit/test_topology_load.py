"""Reading a topology file: every problem named at once, overrides, TOML errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.errors import ConfigError, ExitCode
from asyncrl.topology import load, plan, template
from asyncrl.topology.schema import Topology

MINIMAL = '[rollout]\nrollout_batch_size = 4\n[trainer]\nhf_checkpoint = "m"\n'


def read(text: str, *overrides: str) -> Topology:
    return load.parse(text, overrides, source="t.toml")


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code is ExitCode.CONFIG
    return caught.value.problems


def test_a_minimal_file_gets_the_defaults() -> None:
    topology = read(MINIMAL)
    assert topology.rollout.n_samples_per_prompt == 1
    assert [table.name for table in topology.generator] == ["generator"]
    assert topology.trainer.lr == 1e-6


def test_an_integer_is_taken_where_a_number_is_wanted() -> None:
    assert read(MINIMAL + "[algorithm]\ntis_clip = 3\n").algorithm.tis_clip == 3.0


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        MINIMAL.replace("= 4", '= "4"')
        + 'lr = "1e-6"\nnum_rollout = 3\n[algo]\n'
        + '[[generator]]\nname = "gen-a"\nenginee = "x"\nconcurrency = 1.5\n'
        + '[weights]\ncarrier = "rsync"\n'
    )
    assert found == [
        (
            "t.toml: [algo]: unknown table; known: rollout, trainer, run, source, generator, reward, buffer, "
            "algorithm, eval, weights"
        ),
        (
            't.toml: rollout.rollout_batch_size: given "4" (a string); allowed: an integer; '
            "write it without quotes"
        ),
        't.toml: trainer.lr: given "1e-6" (a string); allowed: a number; write it without quotes',
        "t.toml: trainer.num_rollout: belongs to [run]; move it there",
        (
            't.toml: generator "gen-a".enginee: unknown option; did you mean "engine"?; '
            "`asyncrl explain generator` lists what is allowed here"
        ),
        (
            't.toml: generator "gen-a".concurrency: given 1.5 (a number); allowed: an integer; '
            "write it without a decimal point or exponent"
        ),
        't.toml: weights.carrier: unknown value "rsync"; allowed: auto, shm, stream',
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pause_generation_mode = 'retract'", 'write generator.on_new_weights = "recompute"'),
        ("pause_generation_mode = 'in_place'", 'write generator.on_new_weights = "keep"'),
        ("disable_grpo_std_normalization = true", "write algorithm.grpo_std_normalization = false"),
        ("max_weight_staleness = 2", "asyncrl's name is rollout.max_staleness"),
        ("rm_type = 'math'", "asyncrl's name is reward.use"),
        ("custom_rm_path = 'a.b'", "asyncrl's name is reward.use"),
        ("ckpt_step = 3", "asyncrl's name is trainer.load"),
        ("bf16 = true", 'asyncrl\'s name is trainer.dtype; write trainer.dtype = "bfloat16"'),
        ("use_fault_tolerance = true", "always on"),
        ("sglang_mem_fraction_static = 0.8", "SGLang is not built in yet"),
        ("tensor_model_parallel_size = 2", "Megatron and FSDP are not built in yet"),
        ("use_wandb = true", "not supported yet"),
        ("eps_clip = 0.2", "belongs to [algorithm]"),
        ("hf-checkpoint = 'x'", "write it hf_checkpoint"),
    ],
)
def test_a_foreign_name_gets_its_mapping(line: str, expected: str) -> None:
    (found,) = problems(MINIMAL + line + "\n")
    assert found.startswith("t.toml: trainer.")
    assert expected in found


def test_an_option_outside_every_table_is_sent_to_its_table() -> None:
    (found,) = problems("lr = 1.0\n" + MINIMAL)
    assert found == "t.toml: lr: belongs to [trainer]; every option stands in a table"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[generator]\n", "write [[generator]]"),
        ("[[run]]\n", "write [run]"),
        ("run = 3\n", "allowed: a table"),
    ],
)
def test_wrong_brackets_are_named(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(text + MINIMAL))


def test_missing_required_options_are_named_even_without_their_tables() -> None:
    found = problems("[run]\n")
    assert [problem.split(":")[1].strip() for problem in found] == [
        "rollout.rollout_batch_size",
        "trainer.hf_checkpoint",
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "true", '"x"'])
def test_a_number_must_be_a_finite_number(value: str) -> None:
    (found,) = problems(f"{MINIMAL}lr = {value}\n")
    assert "trainer.lr" in found


def test_malformed_toml_is_one_line_with_line_and_column() -> None:
    (found,) = problems("[run]\nname =\n")
    assert found.startswith("t.toml: not valid TOML:")
    assert "line 2, column 7" in found


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "topology.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load.load(path)
    assert len(caught.value.problems) == 1


def test_overrides_take_toml_values_and_bare_strings() -> None:
    topology = read(
        MINIMAL,
        "trainer.lr=1e-4",
        "run.name=demo",
        "algorithm.use_tis = true",
        'rollout.rollout_stop=["a", "b"]',
        "run.dir=2024",
        "source.apply_chat_template_kwargs.enable_thinking=false",
    )
    assert topology.trainer.lr == 1e-4
    assert (topology.run.name, topology.run.dir) == ("demo", "2024")
    assert topology.algorithm.use_tis is True
    assert topology.rollout.rollout_stop == ["a", "b"]
    assert topology.source.apply_chat_template_kwargs == {"enable_thinking": False}


def test_an_override_finds_its_table_by_name_by_position_or_alone() -> None:
    two = MINIMAL + '[[generator]]\nname = "a"\n[[generator]]\nname = "b"\n'
    topology = read(two, "generator.b.concurrency=3", "generator.0.concurrency=5")
    assert [table.concurrency for table in topology.generator] == [5, 3]
    assert read(MINIMAL, "generator.concurrency=7").generator[0].concurrency == 7
    (found,) = problems(two, "generator.concurrency=7")
    assert "with one of: a, b" in found


def test_a_bare_key_is_an_override_where_one_table_has_it() -> None:
    assert read(MINIMAL, "lr=0.5").trainer.lr == 0.5
    (found,) = problems(MINIMAL, "num_threads=2")
    assert "trainer.num_threads, generator.num_threads" in found


def test_none_takes_an_option_back_to_its_default() -> None:
    assert read(MINIMAL + "save_interval = 5\n", "trainer.save_interval=none").trainer.save_interval is None


def test_a_wrong_override_says_that_it_came_from_the_command_line() -> None:
    assert problems(MINIMAL, "trainer.lr=fast", "rollout.nope=1", "x", "nope.a=1") == [
        "--set x: given no value; write --set table.key=value",
        (
            "--set nope.a=1: unknown table [nope]; known: rollout, trainer, run, source, generator, reward, "
            "buffer, algorithm, eval, weights"
        ),
        "--set: rollout.nope: unknown option; `asyncrl explain rollout` lists what is allowed here",
        '--set: trainer.lr: given "fast" (a string); allowed: a number; write it without quotes',
    ]


def test_a_compiled_topology_can_be_overridden_again() -> None:
    compiled = plan.compile_plan(load.parse(template.starter(), source="starter")).topology
    changed = load.override(compiled, ["algorithm.use_opsm=true"])
    assert changed.algorithm.use_opsm
    assert load.override(changed, ["algorithm.use_opsm=false"]) == compiled
