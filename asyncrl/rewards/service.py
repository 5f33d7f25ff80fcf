"""POST JSON to a service that is somebody else's, and keep asking while there is hope.

Owns the session, the retries and what their errors say; what an answer means is its callers' business.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp

from asyncrl.errors import RewardError

MAX_ATTEMPTS = 10
"""slime's number."""
MAX_CONNECTIONS = 64
"""slime's number."""
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""Pauses double from the first to this; the caller's deadline ends them all."""
ATTEMPT_TIMEOUT_S = 120.0
"""slime's limit for one request."""


class Service:
    """One session to one address, shared by all who ask there."""

    def __init__(self, who: str) -> None:
        """`who` begins every error."""
        self._who = who
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self, url: str, payload: Any, *, max_reply_bytes: int, timeout_s: float | None = None
    ) -> bytes:
        """The body of the answer.

        Connection errors, timeouts and answers 429 and 5xx are tried again; another status, or too long an
        answer, is not. Raises RewardError; TimeoutError when all of it took over `timeout_s`. Both say what
        happened last.
        """
        last = "no answer"
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(MAX_ATTEMPTS):
                    if attempt:
                        await asyncio.sleep(_pause(attempt))
                    try:
                        async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                            return await self._post(url, payload, max_reply_bytes)
                    except (
                        aiohttp.ClientConnectionError,
                        aiohttp.ClientPayloadError,
                        TimeoutError,
                        _Busy,
                    ) as error:
                        last = f"{type(error).__name__} {error}"
        except TimeoutError as error:
            raise TimeoutError(f"{self._who}: {url} took over {timeout_s:g} s; last: {last}") from error
        raise RewardError(f"{self._who}: {url} failed {MAX_ATTEMPTS} times; last: {last}")

    async def _post(self, url: str, payload: Any, max_reply_bytes: int) -> bytes:
        async with self._opened().post(url, json=payload) as reply:
            if reply.status == 429 or reply.status >= 500:
                raise _Busy(f"status {reply.status}")
            body = bytearray()
            async for chunk in reply.content.iter_any():
                body += chunk
                if len(body) > max_reply_bytes:
                    raise RewardError(f"{self._who}: {url} answered more than {max_reply_bytes} bytes")
            if reply.status != 200:
                raise RewardError(f"{self._who}: {url} answered status {reply.status}: {bytes(body[:200])!r}")
            return bytes(body)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                # Ours instead: where both end at once, aiohttp's takes the caller's deadline for its own.
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    async def close(self) -> None:
        """Close the session. May be called twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _pause(attempt: int) -> float:
    """Seconds before an attempt; random, so that many clients do not return at once."""
    return min(FIRST_PAUSE_S * 2.0 ** (attempt - 1), MAX_PAUSE_S) * random.uniform(0.5, 1.0)


class _Busy(Exception):  # noqa: N818
    """The service asks to come again."""
