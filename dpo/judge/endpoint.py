"""Any OpenAI-compatible endpoint as a judge: prompts in, their answers out, none lost, none paid for twice.

    prompts -> requests -> answers kept from before; the rest asked, many at once, tried again, kept as they come

An answer is kept under the hash of its request in run.cache, so that after a kill, a fault or endpoint.max_cost the
same command asks for the rest only. No dimension letters. Read next: dpo/judge/asked.py, which reads verdicts.
"""

import asyncio
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dpo.config import EndpointConfig
from dpo.judge.statistics import wilson_interval
from dpo.log import progress
from dpo.loop import interruptible
from dpo.rows import Message
from models.errors import UserError, show
from models.files import read_text

if TYPE_CHECKING:  # the extra `api`: imported where it is used
    from openai import AsyncOpenAI

BACKOFF_S, MOST_BACKOFF_S = 0.5, 30.0
MOST_WAIT_S = 600.0  # that an endpoint may ask for
MOST_INVALID = 0.3  # share of the answers, as the service that the study used has it
LEAST_LOG_P = -9999.0  # vLLM's own for -inf
TEMPLATE_TOKENS = 256  # that a chat template may add to a prompt
UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
INTERRUPTED = "interrupted"
UNREACHABLE, LOST, TIMED_OUT, NO_CREDIT = 0, -1, 408, 402  # lost: reached, and then cut off
RETRIED = (UNREACHABLE, LOST, TIMED_OUT, 409, 429)
FATAL = {
    401: "the key is missing or wrong: set the environment variable {api_key_env} (endpoint.api_key_env names it)",
    NO_CREDIT: "the account has no credit left",
    403: "the key in {api_key_env} may not do this",
    404: "there is no endpoint.model={model} at endpoint.url={url}",
}

Request = dict[str, object]
Prompt = tuple[Message, ...]
Headers = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What a judge wrote; `text` is the reason where there is no answer, which `finish` then calls "error"."""

    text: str
    finish: str  # "stop", "length" (cut at endpoint.max_tokens), "content_filter", ...
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()  # each with log p (nats) of the likeliest in its place
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""  # as the endpoint names what it ran
    time_s: float = 0.0
    ids: tuple[int, ...] = ()  # the tokens of a local model's, its end included


InForm = Callable[[Answer], bool]
Ask = Callable[[Sequence[Prompt], InForm], list[Answer]]
"""A judge that writes: prompts in, answers out, in order. A prompt that is there k times is answered k times."""


@dataclass
class Usage:
    """What a run's answers took so far; those found count with what was once paid for them."""

    found: int = 0
    unanswered: int = 0
    failed_tries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None  # dollars at list prices; None where the model has none
    price: tuple[float, float] | None = None  # these, a token read and a token written
    time_s: float = 0.0


def endpoint(config: EndpointConfig, cache: Path, usage: Usage) -> Ask:
    """The judge that `config` names; it keeps its answers below `cache` and adds to `usage` what they take.

    UserError where it cannot be used (key, model, address, cost) or more than 30 % of its answers are not in form.
    """
    if importlib.util.find_spec("openai") is None:
        raise UserError(f"endpoint.url={config.url}: needs the package openai: pip install -e '.[api]'")
    if not (key := _key(config)).isascii() or not key.isprintable():
        raise UserError(f"endpoint.api_key_env={config.api_key_env}: this variable holds no key: plain characters only")
    usage.price = read_price(config)
    usage.cost = None if usage.price is None else 0.0
    name = f"{re.sub(r'[^a-zA-Z0-9.-]', '_', config.model)[:60]}-{_hash([config.url, config.model])[:8]}"
    path = cache / "answers" / f"{name}.jsonl"

    def ask(prompts: Sequence[Prompt], in_form: InForm) -> list[Answer]:
        begin = time.perf_counter()
        requests = [request_of(prompt, config) for prompt in prompts]
        keys = _keys(requests)
        answers: dict[str, Answer] = {}
        with (
            kept_answers(path) as (kept, keep),
            progress(len(prompts), f"asking {config.model}", "answers") as bar,
            interruptible() as interrupted,
        ):
            job = _Job(config, usage, in_form, interrupted)

            def take(key: str, answer: Answer) -> None:
                if answer.finish != "error" and key not in kept:
                    keep(key, answer)
                answers[key] = answer
                job.count(answer)
                bar.update()

            for key in keys:
                if key in kept:
                    take(key, kept[key])
            usage.found += len(answers)
            waiting = [(key, request) for key, request in zip(keys, requests, strict=True) if key not in answers]
            if waiting:
                asyncio.run(_ask_all(waiting[::-1], job, take))
        usage.time_s += time.perf_counter() - begin
        if job.stop or job.invalid > MOST_INVALID * len(prompts):
            had = f"{job.answered} of {len(prompts)} answers are kept in {path}, not to be asked for again"
            if job.stop == INTERRUPTED:
                raise KeyboardInterrupt(f"{had}; the same command goes on")
            raise UserError(f"{job.stop or job.not_in_form()}. {had}")
        return [answers[key] for key in keys]

    return ask


def request_of(prompt: Prompt, config: EndpointConfig) -> Request:
    """The body of POST /chat/completions; all its fields are OpenAI's and vLLM's."""
    request: Request = {"model": config.model, "messages": list(prompt), "temperature": config.temperature}
    request["max_completion_tokens"] = config.max_tokens
    if config.top_logprobs:
        request |= {"logprobs": True, "top_logprobs": config.top_logprobs}
    for setting in config.extra:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"endpoint.extra = {setting!r}: must be NAME=VALUE, e.g. reasoning_effort=low")
        if name in ("model", "messages", "stream", "n"):
            raise UserError(f"endpoint.extra = {setting!r}: {name} is not free: one answer, to our question, at once")
        try:
            request[name] = json.loads(value)
        except (ValueError, RecursionError):
            request[name] = value
    return {name: value for name, value in request.items() if value is not None}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _keys(requests: Sequence[Request]) -> list[str]:
    """Content address of each: the hash of the request, and how many of the same stand before it."""
    seen: Counter[str] = Counter()
    keys = []
    for digest in map(_hash, requests):
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


# ---- answers kept on disk


@contextmanager
def kept_answers(path: Path) -> Iterator[tuple[dict[str, Answer], Callable[[str, Answer], None]]]:
    """The answers in `path` by key, and what appends one: a line on disk a call, or an OSError.

    What a kill has left of a last line is dropped. Within it no other process has the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is adding to it; wait for its end") from None
        file.seek(0)
        whole, newline, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole + newline))
        kept: dict[str, Answer] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                key, tokens = record.pop("key"), record.pop("tokens")
                kept[key] = Answer(tokens=tuple((token, top) for token, top in tokens), **record)
            except (ValueError, TypeError, LookupError, AttributeError):
                raise UserError(f"{path}:{number}: is no kept answer; mend or remove the altered line") from None

        def keep(key: str, answer: Answer) -> None:
            line, end = json.dumps({"key": key, **asdict(answer)}).encode() + b"\n", file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                error.filename = str(path)  # write() does not say where the disk is full
                raise
            kept[key] = answer

        yield kept, keep


# ---- what may still be asked


@dataclass
class _Job:
    """One list of prompts under way: what it may spend, how it goes, and why it is to stop."""

    config: EndpointConfig
    usage: Usage
    in_form: InForm
    interrupted: Callable[[], bool]
    answered: int = 0
    unanswered: int = 0
    invalid: int = 0  # unanswered, or not in form
    example: str = ""  # of an invalid one
    reserved: dict[int, float] = field(default_factory=dict)  # by worker, the most that its request can cost
    resume_at: float = 0.0  # monotonic seconds before which the endpoint wants no request
    stop: str = ""

    def ended(self) -> bool:
        """Whether nothing more is to be asked; `stop` says why."""
        self.stop = self.stop or (INTERRUPTED if self.interrupted() else "")
        return bool(self.stop)

    def count(self, answer: Answer) -> None:
        """Add an answer; stops the job where surely more than may be are not in form."""
        usage, failed = self.usage, answer.finish == "error"
        self.unanswered += failed
        self.answered += not failed
        usage.unanswered += failed
        usage.prompt_tokens += answer.prompt_tokens
        usage.completion_tokens += answer.completion_tokens
        if usage.price is not None and usage.cost is not None:
            usage.cost += _cost(usage.price, answer.prompt_tokens, answer.completion_tokens)
            usage.cost = usage.cost if answer.prompt_tokens or failed else None
        if failed or not self.in_form(answer):
            self.invalid += 1
            self.example = answer.text if failed else f"{answer.finish}: {show(answer.text)}"
        if wilson_interval(self.invalid, self.answered + self.unanswered, z=4)[0] > MOST_INVALID:
            self.stop = self.stop or self.not_in_form()

    def may_spend(self, worker: int, request: Request) -> bool:
        """Reserves what the request can cost at most; stops the job where that is too much with nothing under way."""
        if not self.config.max_cost or self.usage.price is None or self.usage.cost is None:
            return True
        most_prompt, most_answer = _most_tokens(request)
        if most_answer < 0:
            self.stop = "endpoint.max_cost: needs a limit of tokens in the request; see max_tokens in endpoint.extra"
            return False
        bound = _cost(self.usage.price, most_prompt, most_answer)
        if self.usage.cost + sum(self.reserved.values()) + bound <= self.config.max_cost:
            self.reserved[worker] = bound
            return True
        if not self.reserved:
            spent = f"{self.usage.cost:.4f} dollars are spent, and the next answer may cost {bound:.4f}"
            self.stop = f"endpoint.max_cost={self.config.max_cost:g}: {spent}; raise it to go on"
        return False

    def not_in_form(self) -> str:
        """What to say where more than 30 % of the answers are none."""
        answers = f"{self.invalid} of {self.answered + self.unanswered} answers of endpoint.model={self.config.model}"
        return (
            f"{answers} failed or are not in the form asked for, more than {MOST_INVALID:.0%}; the last one, "
            f"{self.example}. Where it is cut (length) set endpoint.max_tokens, where a field is refused "
            "endpoint.top_logprobs=0 or endpoint.extra; else take another model"
        )


def read_price(config: EndpointConfig) -> tuple[float, float] | None:
    """Dollars per prompt and per answer token; None for a model without a price, which max_cost does not allow."""
    path = Path(config.prices) if config.prices else Path(__file__).with_name("prices.toml")
    text = read_text(path)
    try:
        table = tomllib.loads(text)
        if config.model not in table and not config.max_cost:
            return None
        price = float(table[config.model]["input"]) / 1e6, float(table[config.model]["output"]) / 1e6
        if not all(0 <= dollars < math.inf for dollars in price):
            raise ValueError("a price is 0 or more")
        return price
    except (ValueError, TypeError, LookupError) as error:
        fault = error if isinstance(error, ValueError) else "it has no such entry, or not both"
        raise UserError(
            f'endpoint.prices={path}: must be TOML that has ["{config.model}"] with input and output, in dollars '
            f"per million tokens, for endpoint.max_cost to hold: {fault}; write such a file and name it there"
        ) from None


def _most_tokens(request: Request) -> tuple[int, int]:
    """Of prompt and answer, at most; -1 of an answer without a limit."""
    prompt = cast("list[Message]", request["messages"])
    most_answer = request.get("max_completion_tokens", request.get("max_tokens"))
    most_prompt = sum(len(message["content"].encode()) for message in prompt) + TEMPLATE_TOKENS
    return most_prompt, most_answer if isinstance(most_answer, int) else -1


def _cost(price: tuple[float, float], prompt_tokens: int, completion_tokens: int) -> float:
    return price[0] * prompt_tokens + price[1] * completion_tokens


# ---- over the wire


def _key(config: EndpointConfig) -> str:
    return os.environ.get(config.api_key_env, "").strip() or "none"


async def _ask_all(waiting: list[tuple[str, Request]], job: _Job, take: Callable[[str, Answer], None]) -> None:
    """Ask what is waiting, last first, until all is done or job.stop says why not; what is under way still ends."""
    from openai import AsyncOpenAI

    config = job.config

    async def work(worker: int) -> None:
        while waiting and not job.ended() and job.may_spend(worker, waiting[-1][1]):
            name, request = waiting.pop()
            answer = await _answer(client, request, job, worker)
            job.reserved.pop(worker, None)
            take(name, answer)

    async with AsyncOpenAI(api_key=_key(config), base_url=config.url, timeout=None, max_retries=0) as client:
        await asyncio.gather(*map(work, range(min(config.concurrency, len(waiting)))))


async def _answer(client: "AsyncOpenAI", request: Request, job: _Job, worker: int) -> Answer:
    """The endpoint's answer, tried again until there is one; finish="error" where there is none.

    Sets job.stop where no other request would be answered either.
    """
    config, begun, tried = job.config, time.monotonic(), 0
    status, fault = 200, ""
    while not job.ended() and tried <= config.max_retries:
        if (wait_s := job.resume_at - time.monotonic()) > 0:
            if wait_s > MOST_WAIT_S:
                job.stop = f"endpoint.url={config.url}: wants no request for {wait_s / 60:.0f} minutes"
            await asyncio.sleep(min(wait_s, 1.0))
            continue
        if not (worker in job.reserved or job.may_spend(worker, request)):
            await asyncio.sleep(0.1)  # until another is done with what it may cost; or the job ends
            continue
        begin = time.perf_counter()
        status, headers, text = await _post(client, request, config.timeout_s)
        asked_s = asked_wait_s(headers)
        job.resume_at = max(job.resume_at, time.monotonic() + asked_s)
        if status == 200:
            try:
                answer = read_answer(text, time.perf_counter() - begin)
                if answer.prompt_tokens or not config.max_cost:
                    return answer
                most_prompt, most_answer = _most_tokens(request)  # it tells no usage
                return replace(answer, prompt_tokens=most_prompt, completion_tokens=most_answer)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                text = f"no chat completion ({error!r}): {show(text)}"
        if status in (200, TIMED_OUT, LOST) and job.usage.cost is not None:  # no answer was had, and it may be charged
            job.usage.cost += job.reserved.pop(worker, 0.0)
        fault = f"HTTP {status}: {text}" if status > 0 else f"cannot be reached: {text}"
        if status in FATAL and not job.stop:
            job.stop = f"{FATAL[status].format_map(config.model_dump())} ({fault})"
            job.stop += await _served(client) if status == 404 else ""
        if status != 200 and status < 500 and status not in RETRIED:
            break
        if job.usage.failed_tries == 0 and config.max_retries:
            print(f"endpoint.url={config.url}: {fault}; trying again", file=sys.stderr)
        job.usage.failed_tries += 1
        # A request that is only held back (429 with a time) has not failed; but it is not held back for ever.
        held = status == 429 and asked_s > 0 and time.monotonic() - begun < MOST_WAIT_S
        tried += not held
        if tried <= config.max_retries:
            await asyncio.sleep(min(BACKOFF_S * 2 ** max(tried - 1, 0), MOST_BACKOFF_S) * random.uniform(0.5, 1))
    if status in (UNREACHABLE, LOST):
        job.stop = job.stop or (
            f"endpoint.url={config.url}: {fault}; check the address (most end in /v1) and that a server runs there, or "
            "raise endpoint.max_retries"
        )
    return Answer(fault, "error")


async def _post(client: "AsyncOpenAI", request: Request, timeout_s: float) -> tuple[int, Headers, str]:
    """Status, headers and text of the response; UNREACHABLE or LOST where there is none, its text the reason."""
    from openai import APIConnectionError, APIStatusError

    try:
        async with asyncio.timeout(timeout_s):
            # All of it as extra_body, which goes above the rest: the library's walk over messages costs a third more.
            create = client.chat.completions.with_raw_response.create
            response = await create(model=str(request["model"]), messages=[], extra_body=request)
        return 200, response.headers, response.text
    except TimeoutError:
        return TIMED_OUT, {}, f"no answer within endpoint.timeout_s={timeout_s:g}"
    except APIStatusError as error:
        status = NO_CREDIT if error.code == "insufficient_quota" else error.status_code
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return status, error.response.headers, str(said or error.message)[:300]
    except APIConnectionError as error:
        never = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")  # of httpx
        return UNREACHABLE if never else LOST, {}, str(error.__cause__ or error)


async def _served(client: "AsyncOpenAI") -> str:
    """What to say of the models that the endpoint has; nothing where it does not tell."""
    from openai import OpenAIError

    try:
        async with asyncio.timeout(10):
            names = [model.id async for model in client.models.list()]
    except (OpenAIError, TimeoutError):
        return ""
    return f"; it has {', '.join(names[:20])}"


def read_answer(text: str, time_s: float) -> Answer:
    """A chat completion as an Answer; ValueError, TypeError, LookupError or AttributeError where it is none."""
    said = json.loads(text)
    choice = said["choices"][0]
    message, usage = choice["message"], said.get("usage") or {}
    content = message["content"]
    tokens = []
    for token in (choice.get("logprobs") or {}).get("content") or ():
        told = ((str(one["token"]), float(one["logprob"])) for one in token.get("top_logprobs") or ())
        top = {word: max(LEAST_LOG_P, logp) for word, logp in told if logp < math.inf}  # nor NaN: not to be relied on
        tokens.append((str(token["token"]), top))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content is {show(content)}")
    return Answer(
        content or str(message.get("refusal") or ""),
        str(choice["finish_reason"]),
        tuple(tokens),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        model=str(said.get("model") or ""),
        time_s=time_s,
    )


def asked_wait_s(headers: Headers) -> float:
    """Seconds for which the endpoint wants no request: retry-after, else until a limit that is used up is lifted."""
    for name, unit in (("retry-after-ms", "ms"), ("retry-after", "s")):
        if name in headers:
            return _seconds(headers[name]) * UNITS_S[unit]
    used_up = [limit for limit in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{limit}") == "0"]
    return max((_seconds(headers.get(f"x-ratelimit-reset-{limit}", "")) for limit in used_up), default=0.0)


def _seconds(text: str) -> float:
    """Of "20", "6m0s", "12ms" or an HTTP date, at least 0; 0 of anything else."""
    if re.fullmatch(r"[\d.]+", text):
        text += "s"
    if re.fullmatch(r"(\d+\.?\d*(ms|[smhd]))+", text):
        return sum(float(number) * UNITS_S[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhd])", text))
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
