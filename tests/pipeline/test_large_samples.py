"""What is larger than a limit is refused by name and the run goes on, or it never starts; what is larger
than a window passes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncrl.errors import ConfigError, ExitCode
from tests.support.books import assert_closed, one, reasons, rows
from tests.support.inside import run_inside

LARGE_GENERATE = '''"""An answer whose metadata fit no message, for one prompt."""


async def generate(args, sample, sampling_params):
    reply = await args.engine.generate(input_ids=sample.tokens, sampling_params=sampling_params)
    meta = reply["meta_info"]
    ids = [token for _, token, _ in meta["output_token_logprobs"]]
    sample.tokens = sample.tokens + ids
    sample.response_length = len(ids)
    sample.rollout_log_probs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    sample.loss_mask = [1] * len(ids)
    sample.weight_versions.append(meta["weight_version"])
    sample.response = reply["text"]
    if sample.group_index == 1:
        sample.metadata["page"] = "x" * (65 << 20)
    sample.status = type(sample).Status.COMPLETED
    return sample
'''

LARGE_REWARD = '''"""A score with a book in it, for one prompt."""


def grade(sample):
    detail = "x" * (9 << 20) if sample.group_index == 1 else ""
    return {"score": 1.0, "judged": detail}
'''


def test_a_prompt_that_is_too_large_is_named_with_file_and_line(tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"prompt": f"{n}+1", "label": str(n + 1)}) for n in range(9)]
    lines[3] = json.dumps({"prompt": "1+1", "label": "2", "metadata": {"image": "x" * (17 << 20)}})
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"prompts\.jsonl has 1 bad lines") as refused:
        run_inside(tmp_path, model)
    text = str(refused.value)
    assert "line 4: the prompt has 178" in text, text
    assert "most in its metadata" in text
    assert "at most 16777216 are allowed" in text
    done = run_inside(tmp_path, model, {"source.on_bad_line": "skip", "run.num_rollout": 2})
    assert done.code == ExitCode.FINISHED


def test_an_answer_that_fits_no_message_fails_its_group_and_no_other(tmp_path: Path, model: Path) -> None:
    """Fails when the link refuses the message: that would end the generator, again and again."""
    (tmp_path / "mine.py").write_text(LARGE_GENERATE, encoding="utf-8")
    done = run_inside(
        tmp_path, model, {"rollout.custom_generate_function_path": f"{tmp_path}/mine.py:generate"}
    )
    assert done.code == ExitCode.FINISHED, done.detail
    assert_closed(done.path)
    assert reasons(done.path)["failed"] == 1
    note = one(done.path, "select note from groups where group_id = 1")
    assert "attempts at generate failed" in note
    assert "at most 67108864 fit a message" in note
    assert rows(done.path, "select name from members group by name having count(*) > 1") == []


def test_a_score_that_is_too_large_fails_its_group_and_no_other(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text(LARGE_REWARD, encoding="utf-8")
    options = {"reward.use": f"{tmp_path}/mine.py:grade", "reward.reward_key": "score"}
    done = run_inside(tmp_path, model, options)
    assert done.code == ExitCode.FINISHED, done.detail
    assert_closed(done.path)
    assert reasons(done.path)["failed"] == 1
    note = one(done.path, "select note from groups where group_id = 1")
    assert "attempts at score failed" in note
    assert "group 1 sample" in note
    assert "at most 8388608 are allowed" in note


def test_windows_smaller_than_anything_only_make_a_run_slow(tmp_path: Path, model: Path) -> None:
    """Every item is larger than its window, and passes when nothing else is under way."""
    options = {
        "buffer.window_bytes": 1,
        "generator.max_bytes": 1,
        "run.num_rollout": 2,
    }
    (tmp_path / "all.py").write_text(
        "def everything(args, samples, **kwargs):\n    return True\n", encoding="utf-8"
    )
    options["rollout.dynamic_sampling_filter_path"] = f"{tmp_path}/all.py:everything"
    eval_data = tmp_path / "held-out.jsonl"
    eval_data.write_text(
        "".join(json.dumps({"prompt": f"{n}+2", "label": "0"}) + "\n" for n in range(5)), encoding="utf-8"
    )
    done = run_inside(tmp_path, model, {**options, "eval.eval_prompt_data": ["held-out", str(eval_data)]})
    assert done.code == ExitCode.FINISHED, done.detail
    assert_closed(done.path)
    assert one(done.path, "select count(*) from groups where reason = 'evaluated'") >= 5
