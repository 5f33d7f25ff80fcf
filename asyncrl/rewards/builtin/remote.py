"""`remote_rm`: a service judges. POST {"prompt", "response", "label"}; it answers a number or a dict."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.hooks import HookSample
from asyncrl.rewards.service import Service

MAX_REPLY_BYTES = 1 << 20
"""A reward is a number or a small dict."""


class RemoteReward:
    """Shares one session among all samples of a child."""

    def __init__(self) -> None:
        self._service = Service("remote_rm")

    async def __call__(self, args: Any, sample: HookSample) -> Any:
        """The service's JSON reply. Raises RewardError when it fails for good (see `Service.ask`)."""
        payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
        body = await self._service.ask(args.rm_url, payload, max_reply_bytes=MAX_REPLY_BYTES)
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise RewardError(
                f"remote_rm: {args.rm_url} answered {body[:200]!r}, which is no JSON"
            ) from error

    async def close(self) -> None:
        """Close the session. May be called twice."""
        await self._service.close()
