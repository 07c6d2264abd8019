"""dpo/judge/endpoint.py against a server on the loopback that misbehaves on purpose: every answer once, none lost."""

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from judge_server import Reply, Script, Served, completion, fault, serving
from pydantic import TypeAdapter

pytest.importorskip("openai")

from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from dpo.config import EndpointConfig
from dpo.judge import endpoint as module
from dpo.judge.asked import verdict_odds
from dpo.judge.endpoint import Answer, Usage, asked_wait_s, endpoint, request_of
from models.errors import UserError

# Fields of vLLM's ChatCompletionRequest (vllm/entrypoints/openai/chat_completion/protocol.py, 2026), with their types.
VLLM_FIELDS = {
    "messages": list,
    "model": str,
    "logprobs": bool,
    "top_logprobs": int,
    "max_completion_tokens": int,
    "temperature": float,
    "reasoning_effort": str,
    "chat_template_kwargs": dict,
    "structured_outputs": dict,
    "seed": int,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)


def prompts(n: int) -> list:
    return [({"role": "system", "content": "Judge."}, {"role": "user", "content": f"pair {i}"}) for i in range(n)]


def ask(
    served: Served, folder: Path, n: int = 4, valid: Callable[[Answer], bool] = lambda answer: True, **settings
) -> tuple[list[Answer], Usage]:
    usage = Usage()
    config = EndpointConfig(**({"url": served.url, "model": "judge-1"} | settings))
    return endpoint(config, folder, usage)(prompts(n), valid), usage


def kept_lines(folder: Path) -> list[dict]:
    lines = [line for file in (folder / "answers").iterdir() for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def says_its_number(body: dict, before: int) -> Reply:
    return completion(body["messages"][1]["content"])


def first(reply: Reply, then: Script = says_its_number) -> Script:
    """Every request meets `reply` before it is answered."""
    return lambda body, before: reply if before == 0 else then(body, before)


def test_answers_come_in_the_order_of_the_prompts_and_many_at_once(tmp_path: Path) -> None:
    def slower_first(body: dict, before: int) -> Reply:
        text = body["messages"][1]["content"]
        return Reply(completion(text).body, delay_s=0.2 if text == "pair 0" else 0.05)

    with serving(slower_first) as served:
        answers, usage = ask(served, tmp_path, 20, concurrency=7)
    assert [answer.text for answer in answers] == [f"pair {i}" for i in range(20)]
    assert served.most_under_way == 7
    assert (usage.prompt_tokens, usage.completion_tokens, usage.found, usage.failed_tries) == (2000, 40, 0, 0)


def test_the_request_is_of_openais_and_of_vllms_schema(tmp_path: Path) -> None:
    extra = ["reasoning_effort=low", 'chat_template_kwargs={"enable_thinking": false}', "seed=3"]
    with serving(says_its_number) as served:
        ask(served, tmp_path, 1, extra=extra)
        plain = ask(served, tmp_path, 1, top_logprobs=0, extra=["temperature=null", "max_completion_tokens=null"])
    sent, bare = map(json.loads, served.asked)
    assert sent == request_of(prompts(1)[0], EndpointConfig(model="judge-1", extra=extra)) | {
        "messages": [*prompts(1)[0]]
    }
    assert bare == {"model": "judge-1", "messages": [*prompts(1)[0]]} and plain
    assert {name: type(value) for name, value in sent.items()} == {name: VLLM_FIELDS[name] for name in sent}
    del sent["chat_template_kwargs"]  # vLLM's own
    assert set(sent) <= set(CompletionCreateParamsNonStreaming.__annotations__)
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(sent)


@pytest.mark.parametrize(
    "reply",
    [
        fault(500),
        fault(503),
        fault(429, retry_after="0.02"),
        fault(429),
        Reply(completion("pair").body, cut=40),
        Reply(completion("pair").body, cut=0),
        Reply(b"<html>busy</html>"),
        Reply(b'{"choices": []}'),
        Reply(b'{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}], "usage": {}}'),
        Reply(completion("late").body, delay_s=5),
    ],
    ids=["500", "503", "429 with a time", "429", "cut", "no body", "html", "no choice", "wrong shape", "slow"],
)
def test_a_passing_fault_is_tried_again(reply: Reply, tmp_path: Path) -> None:
    with serving(first(reply)) as served:
        answers, usage = ask(served, tmp_path, timeout_s=2)
    assert [answer.text for answer in answers] == [f"pair {i}" for i in range(4)]
    assert set(served.asked.values()) == {2} and usage.failed_tries == 4
    assert len({line["key"] for line in kept_lines(tmp_path)}) == len(kept_lines(tmp_path)) == 4


def test_a_judge_of_many_faults_answers_2000_requests_once_each(tmp_path: Path) -> None:
    rng, lock = random.Random(0), threading.Lock()
    faults = [fault(500), fault(429, retry_after_ms="5"), Reply(completion("x").body, cut=50), Reply(b"{"), fault(503)]

    def script(body: dict, before: int) -> Reply:
        with lock:
            return rng.choice(faults) if rng.random() < 0.05 else says_its_number(body, before)

    with serving(script) as served:
        answers, usage = ask(served, tmp_path, 2000)
    assert [answer.text for answer in answers] == [f"pair {i}" for i in range(2000)]
    assert len({line["key"] for line in kept_lines(tmp_path)}) == len(kept_lines(tmp_path)) == 2000
    assert usage.failed_tries > 50 and usage.unanswered == 0
    assert sum(served.asked.values()) == 2000 + usage.failed_tries


def test_what_was_answered_is_not_asked_again_and_a_prompt_that_stands_there_twice_is(tmp_path: Path) -> None:
    with serving(says_its_number) as served:
        ask(served, tmp_path, 3)
        answers, usage = ask(served, tmp_path, 5)
        assert (usage.found, usage.prompt_tokens) == (3, 500) and sum(served.asked.values()) == 5
        assert [answer.text for answer in answers] == [f"pair {i}" for i in range(5)]
        config = EndpointConfig(url=served.url, model="judge-1")
        again = endpoint(config, tmp_path, Usage())([prompts(1)[0]] * 3, lambda answer: True)
        assert len(again) == 3 and sum(served.asked.values()) == 7
        ask(served, tmp_path, 5, temperature=0.5)  # another request
        assert sum(served.asked.values()) == 12


CLIENT = """
import sys
from pathlib import Path
from dpo.config import EndpointConfig
from dpo.judge.endpoint import Usage, endpoint
config = EndpointConfig(url=sys.argv[1], model="judge-1", concurrency=8)
prompts = [({"role": "system", "content": "Judge."}, {"role": "user", "content": f"pair {i}"}) for i in range(400)]
endpoint(config, Path(sys.argv[2]), Usage())(prompts, lambda answer: True)
"""


def test_a_kill_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    with serving(lambda body, before: Reply(says_its_number(body, before).body, delay_s=0.01)) as served:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, served.url, str(tmp_path)])
        while served.answered.total() < 150 and client.poll() is None:
            time.sleep(0.005)
        client.send_signal(signal.SIGKILL)
        client.wait()
        [file] = (tmp_path / "answers").iterdir()
        kept = len(file.read_text().splitlines())
        assert 100 < kept <= served.answered.total() < 400
        file.write_bytes(file.read_bytes()[:-30])  # as if the kill had come within the last line
        before = served.asked.total()
        answers, usage = ask(served, tmp_path, 400)
        assert usage.found == kept - 1 and served.asked.total() - before == 400 - usage.found
    assert [answer.text for answer in answers] == [f"pair {i}" for i in range(400)]
    assert len({line["key"] for line in kept_lines(tmp_path)}) == len(kept_lines(tmp_path)) == 400


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(tmp_path: Path) -> None:
    with serving(lambda body, before: Reply(says_its_number(body, before).body, delay_s=0.2)) as served:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, served.url, str(tmp_path)], stderr=subprocess.PIPE)
        while served.answered.total() < 16 and client.poll() is None:
            time.sleep(0.005)
        client.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt: " in client.communicate()[1]
        assert len(kept_lines(tmp_path)) == served.answered.total() == served.asked.total() < 60


def test_an_altered_file_and_a_second_process_are_told(tmp_path: Path) -> None:
    with serving(says_its_number) as served:
        ask(served, tmp_path, 3)
        [file] = (tmp_path / "answers").iterdir()
        with module.kept_answers(file), pytest.raises(UserError, match="another process"):
            ask(served, tmp_path, 3)
        file.write_text(file.read_text().replace('"finish"', '"end"', 1))
        with pytest.raises(UserError, match=r"jsonl:1: is no kept answer"):
            ask(served, tmp_path, 3)


def test_a_full_disk_stops_the_job_and_leaves_whole_lines(
    tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(64 * 1024)
    with serving(says_its_number) as served:
        with pytest.raises(OSError, match="No space left.*judge-1.*jsonl"):
            ask(served, disk, 2000)
        kept = kept_lines(disk)  # every line is JSON
        assert 50 < len(kept) < 1000 and [*(disk / "answers").iterdir()][0].read_bytes().endswith(b"\n")
    capfd.readouterr()


# ---- faults that do not pass


def refused(served: Served, folder: Path, n: int = 4, **settings) -> str:
    with pytest.raises(UserError) as error:
        ask(served, folder, n, **settings)
    return str(error.value)


def test_a_wrong_key_is_told_at_once_and_the_right_one_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda body, before: fault(401, "Incorrect API key provided")) as served:
        monkeypatch.setenv("MY_KEY", "sk-mine")
        message = refused(served, tmp_path, api_key_env="MY_KEY")
        assert "variable MY_KEY" in message and "Incorrect API key provided" in message and "sk-mine" not in message
        assert served.keys == {"Bearer sk-mine"} and set(served.asked.values()) == {1}
        for key, told in (
            ("sk-\u00e9", "holds no key"),
            ("sk-\nmine", "holds no key"),
            (" sk-mine\n", "variable MY_KEY"),
        ):
            monkeypatch.setenv("MY_KEY", key)
            message = refused(served, tmp_path, api_key_env="MY_KEY")
            assert told in message and "sk-" not in message


def test_an_unknown_model_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with serving(lambda body, before: fault(404, "The model does not exist"), models=("judge-7", "chat-2")) as served:
        message = refused(served, tmp_path)
        assert (
            "endpoint.model=judge-1" in message and "judge-7, chat-2" in message and set(served.asked.values()) == {1}
        )
        assert "no endpoint.model" in refused(Served(served.url + "/v2"), tmp_path)


def test_a_spent_account_and_a_day_long_wait_stop_the_job(tmp_path: Path) -> None:
    with serving(lambda body, before: fault(429, "You exceeded your quota", "insufficient_quota")) as served:
        assert "no credit left" in refused(served, tmp_path)
    with serving(lambda body, before: fault(429, retry_after="7200")) as served:
        assert "wants no request for 120 minutes" in refused(served, tmp_path)
        assert served.asked.total() <= 4


def test_a_host_that_is_not_there_is_told_and_what_was_answered_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(says_its_number) as served:
        ask(served, tmp_path, 3)
    message = refused(served, tmp_path, 5, max_retries=2)
    assert served.url in message and "cannot be reached" in message and "3 of 5 answers are kept" in message
    assert "trying again" in capfd.readouterr().err


def test_a_judge_that_never_answers_in_form_is_stopped_early(tmp_path: Path) -> None:
    with serving(lambda body, before: completion("I cannot help with that.")) as served:
        message = refused(served, tmp_path, 500, valid=lambda answer: answer.text in "AB", concurrency=4)
        assert "I cannot help" in message and "more than 30%" in message and served.asked.total() < 20
        asked = served.asked.total()
        assert "I cannot help" in refused(served, tmp_path, 500, valid=lambda answer: answer.text in "AB")
        assert served.asked.total() == asked  # what is kept says enough


def test_the_job_is_stopped_above_30_percent_and_not_below(tmp_path: Path) -> None:
    def some(invalid: int) -> Script:
        return lambda body, before: completion("?" if int(body["messages"][1]["content"][5:]) % 10 < invalid else "A")

    for invalid, folder in ((3, "three"), (4, "four")):
        with serving(some(invalid)) as served:
            in_form = {"valid": lambda answer: answer.text == "A"}
            if invalid == 3:
                answers, _ = ask(served, tmp_path / folder, 60, **in_form)
                assert sum(answer.text == "?" for answer in answers) == 18
            else:
                assert "24 of 60" in refused(served, tmp_path / folder, 60, **in_form)


def test_a_request_that_is_never_answered_is_counted_and_asked_again_the_next_time(tmp_path: Path) -> None:
    def one_too_long(body: dict, before: int) -> Reply:
        bad = body["messages"][1]["content"] == "pair 2"
        return fault(400, "maximum context length") if bad else says_its_number(body, before)

    with serving(one_too_long) as served:
        answers, usage = ask(served, tmp_path, 10)
        assert (usage.unanswered, answers[2].finish, len(kept_lines(tmp_path))) == (1, "error", 9)
        assert "maximum context length" in answers[2].text and math.isnan(verdict_odds(answers[2]))
        _, usage = ask(served, tmp_path, 10)
        assert (usage.found, usage.unanswered) == (9, 1)


# ---- rate limits and cost


def test_the_times_that_endpoints_ask_for_are_understood() -> None:
    assert asked_wait_s({}) == 0 == asked_wait_s({"retry-after": "soon"})
    assert asked_wait_s({"retry-after": "20"}) == 20 and asked_wait_s({"retry-after-ms": "1500"}) == 1.5
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < asked_wait_s({"retry-after": date}) <= 31
    limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}
    assert asked_wait_s(limits) == 360 and asked_wait_s(limits | {"x-ratelimit-remaining-requests": "7"}) == 0
    tokens = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1h2m3.5s"}
    assert asked_wait_s(limits | tokens) == 3723.5 and asked_wait_s(limits | {"retry-after": "12ms"}) == 0.012


def test_a_limit_that_is_used_up_holds_all_requests_back(tmp_path: Path) -> None:
    times: list[float] = []

    def limited(body: dict, before: int) -> Reply:
        times.append(time.monotonic())
        headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
        return Reply(says_its_number(body, before).body, headers=headers)

    with serving(limited) as served:
        ask(served, tmp_path, 3, concurrency=1)
    assert all(later - earlier >= 0.3 for earlier, later in zip(times, times[1:], strict=False))


def test_requests_that_are_held_back_do_not_use_up_their_tries(tmp_path: Path) -> None:
    with serving(
        lambda b, before: fault(429, retry_after_ms="5") if before < 5 else says_its_number(b, before)
    ) as served:
        answers, usage = ask(served, tmp_path, 2, max_retries=1)
    assert [answer.text for answer in answers] == ["pair 0", "pair 1"] and usage.failed_tries == 10


def test_cost_is_counted_and_the_limit_never_passed(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[judge-1]\ninput = 1000\noutput = 5000\n")  # 0.11 dollars an answer of 100 + 2 tokens
    with serving(says_its_number) as served:
        _, usage = ask(served, tmp_path, 4, prices=str(prices))
        assert usage.cost == pytest.approx(4 * 0.11)
        message = refused(served, tmp_path, 40, prices=str(prices), max_cost=2.0)
        spent = len(kept_lines(tmp_path)) * 0.11
        assert "endpoint.max_cost=2" in message and 1.5 < spent <= 2.0
        asked = served.asked.total()
        refused(served, tmp_path, 40, prices=str(prices), max_cost=2.0)
        assert served.asked.total() == asked
        _, usage = ask(served, tmp_path, 40, prices=str(prices), max_cost=5.0)
        assert usage.cost == pytest.approx(40 * 0.11) and served.asked.total() == 40


def test_what_may_be_charged_without_an_answer_counts_towards_the_limit(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[judge-1]\ninput = 1000\noutput = 5000\n")
    body = completion("pair 0").body
    for number, torn in enumerate((Reply(body[:-20]), Reply(body, cut=20), Reply(body, delay_s=5.0))):
        with serving(lambda asked, before, torn=torn: torn) as served:
            message = refused(
                served, tmp_path / str(number), 1, prices=str(prices), max_cost=3.0, max_retries=20, timeout_s=0.2
            )
            assert "endpoint.max_cost=3" in message and 1 <= served.asked.total() < 20, torn


def without(*names: str) -> Script:
    """The answer to its number without these fields."""

    def reply(body: dict, before: int) -> Reply:
        said = json.loads(says_its_number(body, before).body)
        return Reply(json.dumps({name: value for name, value in said.items() if name not in names}).encode())

    return reply


def test_an_answer_that_tells_no_usage_is_one_and_its_cost_is_unknown_or_the_most_that_it_can_be(
    tmp_path: Path,
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[judge-1]\ninput = 1000\noutput = 5000\n")
    with serving(without("usage", "model")) as served:
        answers, usage = ask(served, tmp_path / "free")
        assert [answer.text for answer in answers] == [f"pair {i}" for i in range(4)] and usage.failed_tries == 0
        assert ask(served, tmp_path / "priced", prices=str(prices))[1].cost is None
        message = refused(served, tmp_path / "limited", 40, prices=str(prices), max_cost=3.0)
        asked = served.asked.total()
        assert "endpoint.max_cost=3" in refused(served, tmp_path / "limited", 40, prices=str(prices), max_cost=3.0)
        assert served.asked.total() == asked  # what is kept counts the next time, too
    assert "endpoint.max_cost=3" in message and 1 <= len(kept_lines(tmp_path / "limited")) < 20


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_log_prob_that_is_no_number_is_not_relied_on(odd: float) -> None:
    read = module.read_answer(completion("A", {"A": odd, "B": -2.5}).body.decode(), 0.1)
    assert verdict_odds(read) > 0  # the text decides
    cut = module.read_answer(completion("A", {"A": -0.1, "B": -math.inf}).body.decode(), 0.1)
    assert 0 < verdict_odds(cut) < math.inf


@pytest.mark.parametrize("setting", ["model=x", "messages=[]", "stream=true", "n=3"])
def test_what_is_asked_cannot_be_replaced(setting: str) -> None:
    with pytest.raises(UserError, match="is not free"):
        request_of(prompts(1)[0], EndpointConfig(model="judge-1", extra=[setting]))


@pytest.mark.parametrize("price", ["-5", "nan", "inf"])
def test_a_price_is_a_number_of_dollars(tmp_path: Path, price: str) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(f"[judge-1]\ninput = {price}\noutput = 1\n")
    with pytest.raises(UserError, match="a price is 0 or more"):
        module.read_price(EndpointConfig(model="judge-1", prices=str(prices)))


def test_a_price_is_known_or_asked_for(tmp_path: Path) -> None:
    with serving(says_its_number) as served:
        assert ask(served, tmp_path, 1)[1].cost is None
        assert 'must be TOML that has ["judge-1"]' in refused(served, tmp_path, max_cost=1.0)
        _, usage = ask(served, tmp_path, 1, model="gpt-5.2")
        assert usage.cost == pytest.approx((100 * 1.75 + 2 * 14) / 1e6)


def test_without_the_package_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[api]'" in refused(Served("http://127.0.0.1:9/v1"), tmp_path)
