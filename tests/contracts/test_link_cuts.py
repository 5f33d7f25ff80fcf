"""A client notices that its connection was lost, also when the server never went away."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from asyncrl.link import bind, connect

WITHIN_S = 10.0


class Word(msgspec.Struct, frozen=True, tag="word"):
    """Anything."""

    text: str


class Wire:
    """A TCP connection through our hands, which can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, other_writer]
        await asyncio.gather(_pass_on(reader, other_writer), _pass_on(other_reader, writer))

    def cut(self) -> None:
        """Lose every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        """The end."""
        assert self._server is not None
        self.cut()
        self._server.close()
        await self._server.wait_closed()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_a_lost_connection_is_counted_and_comes_back() -> None:
    server = bind("tcp://127.0.0.1:0", receives=Word)
    wire = Wire(int(server.address.rpartition(":")[2]))
    client = connect(f"tcp://127.0.0.1:{await wire.open()}", identity=b"client", receives=Word)
    async with asyncio.timeout(WITHIN_S):
        await client.send(Word("one"))
        assert (await server.recv()).message == Word("one")
        assert client.cuts == 0
        for number in (1, 2):
            wire.cut()
            while client.cuts < number:  # noqa: ASYNC110 - it is counted while the loop turns
                await asyncio.sleep(0.01)
            await client.send(Word("again"))
            assert (await server.recv()).message == Word("again")
            await server.send(b"client", Word("back"))
            assert (await client.recv()).message == Word("back")
            assert client.cuts == number
    await client.close()
    await wire.close()
    await server.close()
