"""The prompt data a plan names, opened: the training source and the evaluation sets."""

from __future__ import annotations

from pathlib import Path

from asyncrl.data.hook_source import HookSource
from asyncrl.data.prompts import PromptBuilder, PromptSpec
from asyncrl.data.source import EvalSet, JsonlSource, PromptSource
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import DataError
from asyncrl.messages.hooks import Args
from asyncrl.topology.flat import flat_options
from asyncrl.topology.plan import Plan


def open_source(plan: Plan, run_dir: Path) -> PromptSource:
    """The training prompts. Raises DataError, PluginError; blocks while the file is scanned."""
    source = plan.topology.source
    tokenizer = Tokenizer.load(plan.topology.trainer.hf_checkpoint, option="trainer.hf_checkpoint")
    spec = prompt_spec(plan)
    if source.data_source_path is not None:
        args = Args(flat_options(plan.topology), custom_config_path=plan.topology.run.custom_config_path)
        builder = PromptBuilder(tokenizer, spec=spec, option="source.data_source_path")
        return HookSource.open(
            source.data_source_path, args=args, directory=run_dir / "source", builder=builder
        )
    if source.prompt_data is None:
        raise DataError("source.prompt_data: no file is named; give one, or source.data_source_path")
    return JsonlSource.open(
        source.prompt_data,
        tokenizer=tokenizer,
        spec=spec,
        rollout_shuffle=source.rollout_shuffle,
        rollout_seed=source.rollout_seed,
        num_epoch=source.num_epoch,
        on_bad_line=source.on_bad_line,
        option="source.prompt_data",
    )


def eval_sets(plan: Plan) -> list[EvalSet]:
    """The held-out sets. Raises DataError; blocks while the files are scanned."""
    if not plan.eval_sets:
        return []
    tokenizer = Tokenizer.load(plan.topology.trainer.hf_checkpoint, option="trainer.hf_checkpoint")
    spec = prompt_spec(plan, evaluation=True)
    return [EvalSet(known.name, path=known.path, tokenizer=tokenizer, spec=spec) for known in plan.eval_sets]


def prompt_spec(plan: Plan, *, evaluation: bool = False) -> PromptSpec:
    """How to read a line of the training or of the evaluation data."""
    source, evals = plan.topology.source, plan.topology.eval
    return PromptSpec(
        input_key=(evals.eval_input_key if evaluation else None) or source.input_key,
        label_key=(evals.eval_label_key if evaluation else None) or source.label_key,
        metadata_key=source.metadata_key,
        tool_key=source.tool_key,
        apply_chat_template=source.apply_chat_template,
        apply_chat_template_kwargs=source.apply_chat_template_kwargs,
        rollout_max_prompt_len=None if evaluation else source.rollout_max_prompt_len,
    )
