"""A chat-completions server on the loopback: it plays the judge or the faults of a script, and counts its requests."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reply:
    """`cut`: the connection ends after so many bytes of the body; `delay_s`: before it begins."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    delay_s: float = 0.0


Script = Callable[[dict, int], Reply]
"""From a request's body, and how often the same came before, to what is replied."""


def completion(
    text: str | None, top: dict[str, float] | None = None, *, finish: str = "stop", refusal: str | None = None
) -> Reply:
    """A chat completion as OpenAI sends it; `top` are the log-probs of the likeliest tokens in the first place."""
    tokens = [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": []}]
    if top is not None:
        tokens[0]["top_logprobs"] = [{"token": token, "logprob": p, "bytes": None} for token, p in top.items()]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
        "logprobs": None if top is None else {"content": tokens, "refusal": None},
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    said = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-1",
        "choices": [choice],
        "usage": usage,
    }
    return Reply(json.dumps(said).encode())


def fault(status: int, message: str = "a fault", code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI sends it."""
    said = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Reply(json.dumps(said).encode(), status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Served:
    """The server's address, and what it was asked and replied so far."""

    url: str
    asked: Counter = field(default_factory=Counter)  # by the request's body
    answered: Counter = field(default_factory=Counter)  # with status 200, whole
    keys: set = field(default_factory=set)
    under_way: int = 0
    most_under_way: int = 0


@contextmanager
def serving(script: Script, models: tuple[str, ...] = ("judge-1",)) -> Iterator[Served]:
    """Within it the server runs, in a thread of its own."""
    served, ready = Served(""), threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                served.keys.add(headers.get("authorization"))
                if lines[0].startswith("GET /v1/models"):
                    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                    reply = Reply(json.dumps(listed).encode())
                elif lines[0].startswith("POST /v1/chat/completions"):
                    reply = script(json.loads(body), served.asked[body])
                    served.asked[body] += 1
                else:
                    reply = fault(404, "no such path")
                served.under_way += 1
                served.most_under_way = max(served.most_under_way, served.under_way)
                if reply.delay_s:
                    await asyncio.sleep(reply.delay_s)
                served.under_way -= 1
                head = [f"HTTP/1.1 {reply.status} X", "Content-Type: application/json"]
                head += [f"Content-Length: {len(reply.body)}", *(f"{k}: {v}" for k, v in reply.headers.items())]
                writer.write("\r\n".join([*head, "", ""]).encode() + reply.body[: reply.cut])
                await writer.drain()
                if reply.cut is not None:
                    break
                served.answered[body] += reply.status == 200
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        running.append((asyncio.get_running_loop(), stop := asyncio.Event()))
        ready.set()
        await stop.wait()
        server.close()  # asyncio.run then cancels what is connected

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield served
    finally:
        loop, stop = running[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
