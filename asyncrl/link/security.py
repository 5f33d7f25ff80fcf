"""Who may talk to whom: private addresses, the run's key file, and the doorkeeper of keyed sockets.

One file holds one CURVE key pair, and possession of the file is membership: servers use it as the server key
and let in only clients that prove they hold the same pair; clients use it as their own pair and as the key
that the server must have. With a key every tcp and ipc connection is authenticated and encrypted; without one
only addresses that other machines cannot reach are accepted.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.asyncio import Context
from zmq.utils import z85

from asyncrl.errors import ConfigError

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_FRAMES_OF_CURVE = 7
"""version, request id, domain, address, identity, mechanism, the client's public key."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """The CURVE pair of a run, both halves in Z85 (40 characters each)."""

    public: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret: keys end up in logs."""
        return f"Key(public={self.public!r}, secret=<hidden>)"


def make_key(path: Path | str) -> Key:
    """Write a new pair to a file that only its owner can read.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    key = Key(public=public.decode(), secret=secret.decode())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path}: exists already and is not overwritten; remove it or name another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: a key cannot be written there: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(key)) + b"\n")
    return key


def read_key(path: Path | str) -> Key:
    """The pair in a file written by `make_key`. Raises ConfigError."""
    try:
        mode = Path(path).stat().st_mode
        key = msgspec.json.decode(Path(path).read_bytes(), type=Key)
        matches = zmq.curve_public(key.secret.encode()) == key.public.encode()
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeError, ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"{path}: not a key file ({error}); make one with `asyncrl keys`") from error
    if not matches:
        raise ConfigError(f"{path}: its public half does not belong to its secret half; make a new one")
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read it (mode {mode & 0o777:o}); run `chmod 600 {path}`")
    return key


def is_private(address: str) -> bool:
    """Whether no other machine can reach an address: memory, ipc, or tcp on a loopback interface."""
    scheme, _, rest = address.partition("://")
    if scheme in {"memory", "ipc"}:
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_private(address: str, *, security: Key | None) -> None:
    """Refuse an address that other machines reach unless there is a key. Raises ConfigError."""
    if security is None and not is_private(address):
        raise ConfigError(
            f"{address}: other machines can reach this address, so it needs a key: make one with "
            "`asyncrl keys FILE` and give it to every process with --key FILE, or use ipc:// or tcp://127.0.0.1"
        )


def arm_server(socket: Any, *, key: Key) -> None:
    """Make a socket accept CURVE only, before it is bound."""
    socket.curve_server = True
    socket.curve_publickey = key.public.encode()
    socket.curve_secretkey = key.secret.encode()
    socket.zap_domain = b"asyncrl"


def arm_client(socket: Any, *, key: Key) -> None:
    """Make a socket speak CURVE, and only to a server with the same key, before it is connected."""
    socket.curve_serverkey = key.public.encode()
    socket.curve_publickey = key.public.encode()
    socket.curve_secretkey = key.secret.encode()


class Doorkeeper:
    """Answers ZeroMQ's authentication requests (ZAP, rfc.zeromq.org/spec/27) of one context."""

    def __init__(self, context: Context, *, key: Key) -> None:
        # Has to be bound before the server socket: with nobody to ask, libzmq lets every CURVE client in.
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ADDRESS)
        self._allowed = z85.decode(key.public.encode())

    async def serve(self) -> None:
        """consumes: requests of libzmq. produces: verdicts. Ends only when it is cancelled."""
        while True:
            request = await self._socket.recv_multipart()
            status, text = (b"200", b"OK") if self._is_member(request) else (b"400", b"not a member")
            await self._socket.send_multipart([b"1.0", request[1], status, text, b"", b""])

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close(linger=0)

    def _is_member(self, request: list[bytes]) -> bool:
        return len(request) == _ZAP_FRAMES_OF_CURVE and request[5:] == [b"CURVE", self._allowed]
