"""`remote_rm`: a service judges. POST {"prompt", "response", "label"}; it answers a number or a dict."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.hooks import HookSample

MAX_ATTEMPTS = 10
"""slime's number."""
MAX_CONNECTIONS = 64
"""slime's number."""
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""Pauses double from the first to this; the reward's own deadline ends them all."""
ATTEMPT_TIMEOUT_S = 120.0
"""slime's limit for one request."""
MAX_REPLY_BYTES = 1 << 20
"""A reward is a number or a small dict."""


class RemoteReward:
    """Shares one session among all samples of a child."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, args: Any, sample: HookSample) -> Any:
        """The service's JSON reply.

        Connection errors, timeouts and replies 429 and 5xx are tried again; another status, or a reply that
        is no JSON, is not. Raises RewardError.
        """
        payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
        last = ""
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                pause = min(FIRST_PAUSE_S * 2 ** (attempt - 1), MAX_PAUSE_S)
                await asyncio.sleep(
                    pause * random.uniform(0.5, 1.0)
                )  # so that many clients do not return at once
            try:
                return await self._ask(args.rm_url, payload)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, _Busy) as error:
                last = f"{type(error).__name__} {error}"
        raise RewardError(f"remote_rm: {args.rm_url} failed {MAX_ATTEMPTS} times; last: {last}")

    async def _ask(self, url: str, payload: dict[str, Any]) -> Any:
        async with self._opened().post(url, json=payload) as reply:
            if reply.status == 429 or reply.status >= 500:
                raise _Busy(f"status {reply.status}")
            body = await _read(reply)
            if reply.status != 200:
                raise RewardError(f"remote_rm: {url} answered status {reply.status}: {body[:200]!r}")
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise RewardError(f"remote_rm: {url} answered {body[:200]!r}, which is no JSON") from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                timeout=aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S),
            )
        return self._session

    async def close(self) -> None:
        """Close the session. May be called twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises RewardError past MAX_REPLY_BYTES."""
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            raise RewardError(f"remote_rm: {reply.url} answered more than {MAX_REPLY_BYTES} bytes")
    return bytes(body)


class _Busy(Exception):  # noqa: N818
    """The service asks to come again."""
