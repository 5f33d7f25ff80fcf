"""Algorithms from a topology file: the run finishes, its books close, a replay gives the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from asyncrl.buffer.records import Records
from asyncrl.errors import ExitCode
from asyncrl.messages.routing import routing_of
from asyncrl.run.replay import Replay
from tests.moe_support import NUM_LAYERS, TOP_K, write_moe
from tests.support.books import assert_closed
from tests.support.inside import Finished, run_inside

EMBEDDED = {"generator.engine": "embedded", "generator.scripted": None}
TWO_STEPS = {"trainer.num_steps_per_rollout": 2, "rollout.max_staleness": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {
        **TWO_STEPS,
        "algorithm.advantage_estimator": "ppo",
        "algorithm.use_kl_loss": True,
        "algorithm.kl_loss_coef": 0.1,
        "trainer.critic_lr": 1e-2,
        "trainer.num_critic_only_steps": 1,
        "trainer.ref_update_interval": 2,
    },
    "reinforce_plus_plus": {
        **TWO_STEPS,
        "algorithm.advantage_estimator": "reinforce_plus_plus",
        "algorithm.normalize_advantages": True,
        "algorithm.kl_coef": 0.1,
        "algorithm.gamma": 0.99,
        "algorithm.correction": "decoupled",
        "trainer.keep_old_actor": True,
    },
    "gspo": {
        "algorithm.correction": "gspo+mis",
        "algorithm.eps_clip": 3e-4,
        "algorithm.eps_clip_high": 4e-4,
        "algorithm.get_mismatch_metrics": True,
        "algorithm.use_opd": True,
        "algorithm.stale": "mask",
        "algorithm.stale_after": 1,
        "trainer.log_probs_chunk_size": 7,
        "trainer.log_probs_max_tokens_per_gpu": 256,
        "trainer.data_pad_size_multiplier": 16,
        "trainer.lr_decay_style": "WSD",
        "trainer.lr_wsd_decay_iters": 2,
        "rollout.max_staleness": 2,
    },
}
SAYS = {
    "ppo": ["train/value_loss", "train/kl_loss", "rollout/values", "train/critic_grad_norm"],
    "reinforce_plus_plus": ["train/behave_imp_weight", "rollout/kl", "rollout/returns"],
    "gspo": ["train/mis_kl", "train/mis_rs_mask_fraction_low", "train/opd_reverse_kl", "train/masked_ratio"],
}


def replays_equal(run: Finished, *overrides: str) -> bool:
    replay = Replay(run.path, overrides=overrides)
    try:
        replay.start()
        return all(outcome.recorded == outcome.replayed for outcome in replay.steps())
    finally:
        replay.close()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_runs_reports_and_replays(tmp_path: Path, model: Path, name: str) -> None:
    teacher = {"algorithm.opd_teacher_load": str(model)} if name == "gspo" else {}
    run = run_inside(tmp_path, model, {**ALGORITHMS[name], **teacher, "buffer.keep": "all"})
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    rows = [row for row in run.metrics("trainer") if "train/step" in row]
    assert rows[-1].keys() >= set(SAYS[name])
    assert replays_equal(run)


def test_the_engines_routing_reaches_the_trainer(tmp_path: Path, model: Path) -> None:
    moe = Path(shutil.copytree(model, tmp_path / "moe"))
    for weights in moe.glob("*.safetensors"):
        weights.unlink()
    write_moe(moe, vocab_size=128)
    shutil.copyfile(model / "generation_config.json", moe / "generation_config.json")
    options = {**EMBEDDED, "rollout.max_staleness": 2, "trainer.lr": 1e-2, "buffer.keep": "all"}
    run = run_inside(tmp_path, moe, {**options, "trainer.use_rollout_routing_replay": True})
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    with Records(run.path) as records:
        samples = [
            sample for row in records.batches() for group in records.batch(row.batch) for sample in group
        ]
    shapes = {routing.shape[1:] for s in samples if (routing := routing_of(s)) is not None}
    assert (len(samples), shapes) == (24, {(NUM_LAYERS, TOP_K)})
    assert replays_equal(run)
    # With weights of the same version and the same experts the two agree.
    rows = [row for row in run.metrics("trainer") if "train/loss" in row]
    assert rows[0]["train/train_rollout_logprob_abs_diff"] < 1e-4
    # Under lagging weights some token would have gone elsewhere.
    assert not replays_equal(run, "trainer.use_rollout_routing_replay=false")


def test_opsm_that_masks_much_is_said_in_words(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The scripted engine's log-probs are nothing like the model's, so that every bad answer is masked.
    run = run_inside(tmp_path, model, {"algorithm.correction": "opsm", "algorithm.opsm_delta": 1e-4})
    assert run.code == ExitCode.FINISHED
    assert max(row.get("train/opsm_masked_fraction", 0.0) for row in run.metrics("trainer")) > 0.1
    assert capsys.readouterr().out.count("OPSM masked") == 1
