"""The client of the neighbour benchmark, a process of its own: measures what the service answers with some calls always
in flight, and then calls it at times drawn beforehand as `load.client` does.

It answers commands, see `shared.process`.
"""

from __future__ import annotations

import asyncio
import time

import grpc

from bench.load.client import METHOD, ClientCommands, Method, request_of
from bench.shared.process import answer_commands
from ferryman.v1 import translation_pb2


async def answered_per_second(address: str, requests: list[bytes], in_flight: int, seconds: float) -> float:
    """Keep `in_flight` calls in flight, taking the requests one after the other; return the answers a second."""
    answered = 0
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        translate: Method = channel.unary_unary(METHOD, None, translation_pb2.TranslateResponse.FromString)
        begin_s = time.perf_counter()

        async def caller(number: int) -> None:
            nonlocal answered
            while time.perf_counter() - begin_s < seconds:
                await translate(requests[number % len(requests)])
                number += in_flight
                answered += 1

        await asyncio.gather(*(caller(number) for number in range(in_flight)))
        return answered / (time.perf_counter() - begin_s)


class NeighbourCommands(ClientCommands):
    """The commands that the client process answers."""

    def capacity(self, address: str, model: str, beam_size: int, length: int, in_flight: int, seconds: float) -> float:
        """Return the requests a second, of one sentence each, that are answered with so many in flight."""
        requests = [request_of(model, [sentence], beam_size, length) for sentence in self._sentences]
        return asyncio.run(answered_per_second(address, requests, in_flight, seconds))


def main() -> None:
    """Answer until no command follows."""
    commands = NeighbourCommands()
    answer_commands({"sentences": commands.sentences, "window": commands.window, "capacity": commands.capacity})


if __name__ == "__main__":
    main()
