"""What can be known to be wrong before anything starts: data, model directory, plug-ins, lengths.

Everything found is reported at once; nothing here imports torch or user code into this process.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from asyncrl.data.open import eval_sets, open_source
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import AsyncrlError, ConfigError, DataError
from asyncrl.topology.hook_kinds import ALGORITHM_HOOKS
from asyncrl.topology.plan import Plan, with_prompts
from asyncrl.topology.plugins import check_plugins, is_plugin_path


def preflight(plan: Plan, run_dir: Path) -> Plan:
    """The plan with `num_rollout` known. Raises ConfigError with a line for each problem."""
    problems = _model_problems(plan)
    num_prompts: int | None = None
    if not problems:
        for check in (_tokenizer_problem, _eval_problem):
            problem = check(plan)
            problems += [problem] if problem else []
        # A custom data source is user code: it is opened in the source's own process.
        if not problems and plan.topology.source.data_source_path is None:
            try:
                num_prompts = open_source(plan, run_dir).num_prompts
            except AsyncrlError as error:
                problems.append(str(error))
    problems += _other_directory_problems(plan)
    problems += _plugin_problems(plan)
    problems += _address_problems(plan)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if plan.num_rollout is None and num_prompts is not None:
        return with_prompts(plan, num_prompts)
    return plan


def _model_problems(plan: Plan) -> list[str]:
    topology = plan.topology
    path = Path(topology.trainer.hf_checkpoint)
    if not path.is_dir():
        return [
            (
                f"trainer.hf_checkpoint: {path} is not a directory; give a Hugging Face model directory "
                "(config.json, safetensors, tokenizer.json)"
            )
        ]
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        return [f"trainer.hf_checkpoint: {path / 'config.json'} cannot be read: {error}"]
    problems = []
    if not any(path.glob("*.safetensors")):
        problems.append(f"trainer.hf_checkpoint: {path} has no *.safetensors file")
    positions = config.get("max_position_embeddings")
    longest = topology.rollout.rollout_max_response_len
    limit = topology.rollout.rollout_max_context_len or positions
    if limit is not None and longest >= limit:
        problems.append(
            f"rollout.rollout_max_response_len: {longest} tokens leave no room for a prompt in a context of "
            f"{limit} (rollout_max_context_len or the model's max_position_embeddings); lower it"
        )
    return problems


def _other_directory_problems(plan: Plan) -> list[str]:
    trainer, model = plan.topology.trainer, "a model directory"
    named = {
        "trainer.load": (trainer.load, "a checkpoint's directory (RUN/checkpoints/step-NNNNNN)"),
        "trainer.critic_load": (trainer.critic_load, model),
        "algorithm.opd_teacher_load": (plan.topology.algorithm.opd_teacher_load, model),
    }
    return [
        f"{option}: {path} is not a directory; give {what}"
        for option, (path, what) in named.items()
        if path is not None and not Path(path).is_dir()
    ]


def _tokenizer_problem(plan: Plan) -> str:
    try:
        tokenizer = Tokenizer.load(plan.topology.trainer.hf_checkpoint, option="trainer.hf_checkpoint")
    except DataError as error:
        return str(error)
    if plan.topology.source.apply_chat_template and not tokenizer.has_chat_template:
        return (
            f"source.apply_chat_template: the tokenizer in {plan.topology.trainer.hf_checkpoint} has no chat "
            "template; set apply_chat_template = false, or add chat_template.jinja to the model directory"
        )
    return ""


def _eval_problem(plan: Plan) -> str:
    try:
        eval_sets(plan)
    except AsyncrlError as error:
        return str(error)
    return ""


def _address_problems(plan: Plan) -> list[str]:
    """Ports that somebody else holds; found here, before a run directory is made."""
    run = plan.topology.run
    named = {
        "run.address": run.address,
        "run.buffer_address": run.buffer_address,
        "run.publisher_address": run.publisher_address,
    }
    return [problem for option, address in named.items() if (problem := _port_problem(option, address))]


def _port_problem(option: str, address: str) -> str:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not port.isdigit() or port == "0":
        return ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host.strip("[]"), int(port)))
        except OSError as error:
            why = f"{address} cannot be listened on: {error.strerror}"
            return f"{option}: {why}; choose another port, or 0 for a free one"
    return ""


def _plugin_problems(plan: Plan) -> list[str]:
    rollout = plan.topology.rollout
    named = [
        (
            "rollout.dynamic_sampling_filter_path",
            "dynamic_sampling_filter",
            rollout.dynamic_sampling_filter_path,
        ),
        ("rollout.rollout_sample_filter_path", "rollout_sample_filter", rollout.rollout_sample_filter_path),
        ("rollout.buffer_filter_path", "buffer_filter", rollout.buffer_filter_path),
        ("rollout.custom_generate_function_path", "generate", rollout.custom_generate_function_path),
        ("source.data_source_path", "data_source", plan.topology.source.data_source_path),
    ]
    for option, kind in ALGORITHM_HOOKS.items():
        named.append((f"algorithm.{option}", kind, getattr(plan.topology.algorithm, option)))
    for table in plan.topology.reward:
        if is_plugin_path(table.use):
            kind = "group_reward" if table.group_rm else "reward"
            named.append((f'reward "{table.name}".use', kind, table.use))
    checks = [(option, kind, path) for option, kind, path in named if path is not None]
    return check_plugins(checks, search_paths=["."]) if checks else []
