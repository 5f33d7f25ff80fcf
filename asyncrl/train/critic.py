"""The critic of PPO: a language model's body with a head that gives one number per token.

Owns its weights, its optimizer and its learning rate. Values are read where log-probs are: at the position
that predicts a response token, so V_t is known before token t was sampled. Not temperature-scaled.

Shape letters: R response tokens of a micro-batch.
"""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from asyncrl.errors import ConfigError
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.forward import response_hidden_states
from asyncrl.train.learner import Learner
from asyncrl.train.micro import MicroBatch
from asyncrl.train.model import load_model
from asyncrl.train.phases import Phases
from asyncrl.train.ranks import Ranks

STATE = "trainer/critic.safetensors"
"""Where a checkpoint keeps a critic's weights."""


class Critic:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        trainer: TrainerConfig,
        phases: Phases,
        ranks: Ranks,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Body from critic_load (a model directory, or a checkpoint of a run with a critic), head zero.

        `weights` are those of a checkpoint to go on from, which come before critic_load's. Raises DataError,
        ConfigError.
        """
        directory = Path(trainer.critic_load or trainer.hf_checkpoint)
        option = "hf_checkpoint" if trainer.critic_load is None else "critic_load"
        self._trainer = trainer
        self._model = load_model(directory, trainer=trainer, option=f"trainer.{option}")
        if trainer.gradient_checkpointing:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        hidden_size = self._model.get_output_embeddings().weight.shape[1]
        # Zero, so that the first values say nothing instead of something arbitrary.
        self._head = nn.Linear(hidden_size, 1, bias=False, device=trainer.device)
        nn.init.zeros_(self._head.weight)
        if weights is None and (directory / STATE).is_file():
            weights = load_file(directory / STATE)
        if weights is not None:
            # Before the optimizer is made: its master copies are of these.
            self._take(weights)
        self.learner = Learner(
            self._parameters(), trainer=trainer, phases=phases, ranks=ranks, lr=trainer.critic_lr
        )

    def _parameters(self) -> dict[str, nn.Parameter]:
        body = {f"body.{name}": p for name, p in self._model.base_model.named_parameters()}
        return {**body, "head.weight": self._head.weight}

    def train(self) -> None:
        """Training mode, for dropout."""
        self._model.train()

    def values(self, micro: MicroBatch) -> Tensor:
        """V_t [R] in the head's precision at every response token, with gradient where it is enabled."""
        packed = self._trainer.attn_implementation == "packed"
        hidden_RD = response_hidden_states(self._model, micro, packed=packed)
        return self._head(hidden_RD.to(self._head.weight.dtype)).squeeze(-1)

    def eval(self) -> None:
        """Evaluation mode."""
        self._model.eval()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights and optimizer by file of a checkpoint; live tensors."""
        weights = {name: parameter.detach() for name, parameter in self._parameters().items()}
        return {"critic": weights, "critic_optimizer": self.learner.optimizer.state()}

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        """Become a checkpoint's critic. Raises ConfigError for another model's."""
        parameters = self._parameters()
        if weights.keys() != parameters.keys() or any(
            weights[name].shape != parameter.shape for name, parameter in parameters.items()
        ):
            raise ConfigError(
                "trainer.critic_load: the critic in the checkpoint is of another model; name a checkpoint of "
                "the same model, or a model directory to start from"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])


def critic_trainer(trainer: TrainerConfig) -> dict[str, Any]:
    """The [trainer] options that a critic has values of its own for."""
    lr = trainer.lr if trainer.critic_lr is None else trainer.critic_lr
    return {
        "lr": lr,
        "min_lr": min(trainer.min_lr, lr),
        "lr_warmup_iters": trainer.critic_lr_warmup_iters,
        "lr_warmup_fraction": None,
    }
