"""The teacher of on-policy distillation behind an SGLang server: its log-probs of finished answers.

    POST {input_ids, sampling_params: {temperature, max_new_tokens: 0}, return_logprob, logprob_start_len}
    <- meta_info.input_token_logprobs, [log-prob or null, token id, text] from token logprob_start_len on

Owns the request, the check of the answer and its place in a `Score`. It judges nothing: rewards stay what
they are. Source: slime --opd-type sglang; slime-miles.md 3.3 and 5.

Invariants: a score leaves with one finite log-prob per response token, each of the token it stands for, loss
mask or not; a sample the teacher did not answer for is a failure by name, never a score without.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.sample import Lane, Sample, Score, pack_logprobs, tokens_of
from asyncrl.rewards.base import FailureKind, RewardFailure, name_of
from asyncrl.rewards.service import MAX_CONNECTIONS, Service

REPLY_BYTES = 1 << 20
REPLY_BYTES_PER_TOKEN = 1 << 10
"""What an answer may be long: SGLang needs some 40 bytes for a token, more where it adds the token's text."""

Result = Score | RewardFailure


class _MetaInfo(msgspec.Struct):
    input_token_logprobs: list[tuple[float | None, int, str | None]]


class _Reply(msgspec.Struct):
    meta_info: _MetaInfo


class Teacher:
    """Asks one server; `close` it when done."""

    def __init__(self, url: str, *, temperature: float, timeout_s: float) -> None:
        """`url` is the server's address, with or without /generate; `timeout_s` bounds a sample's requests.

        `temperature` is rollout_temperature. Stock SGLang (0.5.23) scales only the log-probs of tokens it
        samples by it; those of given tokens are of the logits as they are.
        """
        self._url = f"{url.rstrip('/')}/generate" if urlsplit(url).path in {"", "/"} else url
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._service = Service("teacher")
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def complete(self, samples: Sequence[Sample], results: Sequence[Result]) -> list[Result]:
        """`results` with the teacher's log-probs in every score that has none yet.

        Failures stay, and so does what a reward function set itself (`sample.teacher_log_probs`). Samples of
        the lane eval are left alone: nothing is trained on them.
        """
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(self._complete(sample, result))
                for sample, result in zip(samples, results, strict=True)
            ]
        return [task.result() for task in asked]

    async def _complete(self, sample: Sample, result: Result) -> Result:
        is_complete = isinstance(result, RewardFailure) or bool(result.teacher_logprobs)
        if is_complete or sample.lane is not Lane.TRAIN or not sample.num_tokens:
            return result
        try:
            async with self._free:
                body = await self._service.ask(
                    self._url,
                    self._request(sample),
                    max_reply_bytes=REPLY_BYTES + REPLY_BYTES_PER_TOKEN * sample.num_tokens,
                    timeout_s=self._timeout_s,
                )
        except TimeoutError as error:
            return _failure(FailureKind.TIMEOUT, sample, error)
        except RewardError as error:
            return _failure(FailureKind.EXCEPTION, sample, error)
        try:
            logprobs = pack_logprobs(response_logprobs(body, sample))
        except RewardError as error:
            return _failure(FailureKind.INVALID, sample, f"teacher: {self._url} {error}")
        return msgspec.structs.replace(result, teacher_logprobs=logprobs)

    def _request(self, sample: Sample) -> dict[str, Any]:
        ids: list[int] = tokens_of(sample.prompt.tokens + sample.tokens).tolist()
        return {
            "input_ids": ids,
            "sampling_params": {"temperature": self._temperature, "max_new_tokens": 0},
            "return_logprob": True,
            # From the prompt's last token on: slime asks from 0, which keeps SGLang from sharing the prompt's
            # cache among a group's answers and makes it compute the logits of every prompt token.
            "logprob_start_len": max(0, len(ids) - sample.num_tokens - 1),
        }

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        await self._service.close()


def response_logprobs(body: bytes, sample: Sample) -> list[float]:
    """The log-probs of the R response tokens in SGLang's answer. Raises RewardError saying what came."""
    try:
        found = msgspec.json.decode(body, type=_Reply).meta_info.input_token_logprobs
    except msgspec.DecodeError as error:
        raise RewardError(
            f"answered {body[:200]!r}; expected JSON with meta_info.input_token_logprobs, a list of "
            f"[log-prob, token id, text]: {error}"
        ) from error
    expected: list[int] = tokens_of(sample.tokens).tolist()
    # The first entry has nothing before it and is null.
    found = found[1:][-len(expected) :]
    if len(found) != len(expected):
        raise RewardError(
            f"answered {len(found)} log-probs; expected {len(expected)}, one per response token"
        )
    for place, ((logprob, token, _), ours) in enumerate(zip(found, expected, strict=True)):
        if token != ours:
            raise RewardError(f"answered for token {token} at response token {place}; expected {ours}")
        if logprob is None or not math.isfinite(logprob):
            raise RewardError(f"answered {logprob} at response token {place}; expected a finite log-prob")
    return [logprob for logprob, _, _ in found if logprob is not None]


def _failure(kind: FailureKind, sample: Sample, cause: object) -> RewardFailure:
    return RewardFailure(kind=kind, message=f"{name_of(sample)}: {cause}")
