"""What preference rows look like elsewhere, and each as one of ours (dpo/rows.py): a literal dict of functions.

A file's format is known by the keys of its first row. What a format itself marks as no preference (equal scores, the
same answer twice) becomes None, counted by reason; whatever else does not fit is an error. Read next: dpo/rows.py.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import NamedTuple

from dpo.shards import Record
from models.errors import UserError, show

Message = dict[str, str]  # role and content; an assistant's may have thinking, what it thought before
Answer = str | Message  # a message where it has thinking
Read = Callable[[object, str, str], Answer]  # an answer from (value, its name, "file:line")
ROLES = ("system", "user", "assistant")
THINKING = ("thinking", "reasoning_content", "reasoning")  # what others call it
# Ours, where another format has them.
KEPT = ("id", "subset", "group", "split", "weight", "margin", "soft_label", "reference_answer")
SCORES = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))
CHANGE_THE_PROMPT = ("tools", "images", "image", "chat_template_kwargs", "system", "system_prompt", "history")
PROMPTS = ("question", "instruction", "input", "query")  # what others call it
JUDGEBENCH, LLMBAR, RB2 = ("response_A", "response_B"), ("output_1", "output_2"), ("num_correct", "num_incorrect")
TOGETHER = ("input", "preferred_output", "non_preferred_output")
LABELLED: dict[str, tuple[tuple[str, ...], tuple[object, object]]] = {  # the keys of prompt and answers, both labels
    "judgebench": (("question", *JUDGEBENCH), ("A>B", "B>A")),
    "llmbar": (("input", *LLMBAR), (1, 2)),
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Format(NamedTuple):
    """One shape of row; `convert` makes ours of a record, or None where it states no preference: `dropped` says why."""

    marks: Callable[[Record], bool]  # asked in the order of FORMATS
    convert: Callable[[Record, str, str, Counter[str]], Record | None]  # of (record, format, "file:line", dropped)
    shape: str  # as messages show it


def plain(answer: Answer) -> str:
    """Runs of white space to one space: two answers that differ in nothing else but their thinking are the same."""
    return " ".join((answer if isinstance(answer, str) else answer["content"]).split())


def text_of(value: object, name: str, where: str, may_be_empty: bool = False) -> str:
    """`value` where it is a text that a tokenizer can read; else a UserError."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text, not {show(value)}")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where}: {name} is empty; give it a text or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, a tokenizer cannot read it
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is no text: {show(value)}") from error
    return value


def messages_of(value: object, name: str, where: str, weights: tuple[int, ...] = ()) -> list[Message]:
    """`value` where it is a list of at least one message (of message_of)."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} must be a list of messages, not {show(value)}")
    return [message_of(message, f"{name}[{index}]", where, weights) for index, message in enumerate(value)]


def message_of(value: object, place: str, where: str, weights: tuple[int, ...] = ()) -> Message:
    """`value` where it is {role, content}, an assistant's perhaps with its thinking under one of THINKING.

    A `weight` is left out, and must be of `weights`. A null thinking is none.
    """
    message = {key: each for key, each in value.items() if key not in THINKING} if isinstance(value, dict) else {}
    if set(message) - ({"weight"} if weights else set()) != {"role", "content"}:
        raise UserError(f"{where}: {place} must have the keys role and content and no other, not {show(value)}")
    if message["role"] not in ROLES:
        raise UserError(f"{where}: {place} has the role {show(message['role'])}; allowed are {', '.join(ROLES)}")
    weight = message.get("weight", 1)
    if type(weight) is not int or weight not in (weights or (1,)):
        raise UserError(f"{where}: {place}.weight is {show(weight)}; allowed are {weights}")
    content = text_of(message["content"], f"{place}.content", where, may_be_empty=True)
    assert isinstance(value, dict)
    named = {key: text_of(value[key], f"{place}.{key}", where) for key in THINKING if value.get(key) is not None}
    thoughts = set(named.values())
    if len(thoughts) > (message["role"] == "assistant"):
        raise UserError(f"{where}: {place} has {' and '.join(named)}; allowed is one thought, and only of 'assistant'")
    return {"role": message["role"], "content": content} | ({"thinking": thoughts.pop()} if thoughts else {})


def recognise(record: Record) -> str | None:
    """The name of the format that the record's keys are of, if any; a null is an absent key."""
    there = {key: value for key, value in record.items() if value is not None}
    return next((name for name, format in FORMATS.items() if format.marks(there)), None)


@cache
def _meant(key: str) -> str:
    swapped = [kept for kept in KEPT if sorted(kept) == sorted(key.lower())]  # letters, or their case alone
    return "" if key in KEPT else "".join(swapped or get_close_matches(key.lower(), KEPT, 1, 0.82))


def check_columns(record: Record, where: str) -> None:
    """UserError for a key that is not read and should not be passed over: a prompt's, or one of ours misspelt."""
    for key, value in record.items():
        if value and key in CHANGE_THE_PROMPT:
            raise UserError(f"{where}: {key} would change the prompt and cannot be read; write it into the messages")
        if value is not None and (meant := _meant(key)):
            raise UserError(f"{where}: the key {key!r} is not read; is it {meant!r}? Rename it, or remove it")


def need(record: Record, key: str, name: str, where: str) -> object:
    """What the record of the format `name` has at `key`; UserError where it has nothing."""
    if record.get(key) is None:
        shape = f"a row of the format {name} is {FORMATS[name].shape}"
        raise UserError(f"{where}: key {key!r} is missing or null; {shape}; data.format= forces another format")
    return record[key]


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: any(key in record for key in keys)


def _is_ours(record: Record) -> bool:
    chosen = record.get("chosen")  # a list of texts is ours alone; others have ids too
    texts = isinstance(chosen, list) and any(isinstance(one, str) for one in chosen)
    return "subset" in record or (texts and _has("id", "prompt", "rejected")(record))


def _is_rmbench(record: Record) -> bool:
    """Texts in lists: a row of ours may have a domain beside its subset, and one of texts or messages too."""
    chosen = record.get("chosen")
    lists = isinstance(chosen, list) and not any(isinstance(one, dict) for one in chosen)
    return "domain" in record and "subset" not in record and lists


def _is_hh(record: Record) -> bool:
    return "prompt" not in record and any(HH_TURN.match(str(record.get(key))) for key in ("chosen", "rejected"))


def _number(record: Record, key: str, name: str, where: str) -> float:
    value = need(record, key, name, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        raise UserError(f"{where}: {key} is {show(value)}; it must be a number")
    return value


def _answer(value: object, name: str, where: str, weights: tuple[int, ...] = ()) -> Answer:
    messages = messages_of(value, name, where, weights)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{where}: {name} must hold exactly one message, from 'assistant', not {show(value)}")
    text_of(messages[0]["content"], f"{name}[0].content", where)
    return _reply(messages[0])


def _reply(message: Message) -> Answer:
    return message if "thinking" in message else message["content"]


def _row(record: Record, name: str, where: str, prompt: object, chosen: list[Answer], rejected: list[Answer]) -> Record:
    """Ours, with the keys of ours that the record has; its id is its place unless it gives one."""
    kept = {key: record[key] for key in KEPT if record.get(key) is not None}
    return {"id": where, "subset": name} | kept | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _rb2(record: Record, name: str, where: str, dropped: Counter[str]) -> Record:
    """Both rows of a Ties question (ref:N, tied:N) are one group: they share N's wrong answers."""
    for key, count in zip(("chosen", "rejected"), RB2, strict=True):
        answers, said = need(record, key, name, where), _number(record, count, name, where)
        if not isinstance(answers, list) or len(answers) != said:
            raise UserError(f"{where}: {key} must be a list of {count} = {said} texts, not {show(answers)}")
    tied = re.fullmatch(r"(?:ref|tied):(\d+)", str(record.get("id")))
    return record | ({"group": f"ties:{tied[1]}"} if tied and record.get("group") is None else {})


def _together(record: Record, name: str, where: str, dropped: Counter[str]) -> Record:
    """Together's rules for a preference file: its columns and no other, roles in turn, exactly one answer a side."""
    if extra := sorted(set(record) - set(TOGETHER)):
        raise UserError(f"{where}: found the extra column {show(extra[0])}; allowed are {', '.join(TOGETHER)} only")
    chat, *outputs = (need(record, key, name, where) for key in TOGETHER)
    if not isinstance(chat, dict) or not {"messages"} <= set(chat) <= {"messages", "tools", "parallel_tool_calls"}:
        raise UserError(f"{where}: input must be an object with the key messages and no other, not {show(chat)}")
    if chat.get("tools"):
        raise UserError(f"{where}: input.tools would change the prompt and cannot be read; write it into the messages")
    messages = messages_of(chat["messages"], "input.messages", where, weights=(0, 1))  # a prompt is not trained anyway
    for before, after in zip(messages, messages[1:], strict=False):
        if before["role"] == after["role"]:
            raise UserError(f"{where}: input.messages has two in a row from {after['role']!r}; roles must alternate")
    answers = [_answer(side, key, where, weights=(1,)) for key, side in zip(TOGETHER[1:], outputs, strict=True)]
    return _row({}, name, where, messages, answers[:1], answers[1:])


def _last_turns(chosen: list[Message], rejected: list[Message], where: str) -> tuple[list[Message], Answer, Answer]:
    """What two whole chats share, all but the last message, and the two last messages."""
    shared, last = chosen[:-1], (chosen[-1], rejected[-1])
    if shared != rejected[:-1] or not shared:
        raise UserError(f"{where}: chosen and rejected must share all messages but the last, at least one")
    if {message["role"] for message in last} != {"assistant"}:
        raise UserError(f"{where}: the last messages of chosen and rejected must be from 'assistant'")
    return shared, _reply(last[0]), _reply(last[1])


def _pair(record: Record, name: str, where: str) -> tuple[object, Answer, Answer]:
    """Prompt, chosen and rejected answer of TRL's shapes: texts, messages, or whole chats that share all but the last.

    Texts without a prompt have it as their longest common beginning, as in TRL, but no word is cut in two.
    """
    prompt = record.get("prompt")
    chosen, rejected = need(record, "chosen", name, where), need(record, "rejected", name, where)
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise UserError(f"{where}: chosen and rejected must be alike, not {show(chosen)} and {show(rejected)}")
    if isinstance(prompt, list) and not isinstance(chosen, str):
        return prompt, _answer(chosen, "chosen", where), _answer(rejected, "rejected", where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        texts = {"chosen": text_of(chosen, "chosen", where), "rejected": text_of(rejected, "rejected", where)}
        if prompt is not None:
            return prompt, chosen, rejected
        if named := next((key for key in PROMPTS if record.get(key)), ""):
            raise UserError(f"{where}: there is {named!r} but no 'prompt': rename it, and the answers are read as its")
        common = re.match(r".*\s", os.path.commonprefix([chosen, rejected]), flags=re.DOTALL)
        if common is None:
            raise UserError(f"{where}: there is no prompt, and chosen and rejected do not begin with a common one")
        end = common.end() - common[0].endswith(" ")  # a space goes to the answer, where tokenizers want it
        rest = [text_of(text[end:], f"{key} behind the common prompt", where) for key, text in texts.items()]
        return chosen[:end], rest[0], rest[1]
    chats = messages_of(chosen, "chosen", where), messages_of(rejected, "rejected", where)
    shared, *answers = _last_turns(*chats, where)
    if prompt is not None and shared[-1]["content"] != prompt:
        raise UserError(f"{where}: prompt is not the last message before the answer in chosen: {show(prompt)}")
    return shared, answers[0], answers[1]


def _trl(record: Record, name: str, where: str, dropped: Counter[str]) -> Record:
    if name == "trl":
        need(record, "prompt", name, where)
    elif record.get("prompt") is not None:
        raise UserError(f"{where}: a row of the format {name} has no key 'prompt'; set data.format=trl")
    prompt, chosen, rejected = _pair(record, name, where)
    return _row(record, name, where, prompt, [chosen], [rejected])


def _binarized(record: Record, name: str, where: str, dropped: Counter[str]) -> Record | None:
    keys = next((keys for keys in SCORES if record.get(keys[0]) is not None), SCORES[0])
    better, worse = (_number(record, key, name, where) for key in keys)
    prompt, chosen, rejected = _pair(record, name, where)
    if better < worse:
        raise UserError(f"{where}: {keys[0]} is below {keys[1]}: {better} < {worse}; exchange the answers")
    return _best(record, name, where, prompt, [(better, chosen), (worse, rejected)], dropped)


def _hh(record: Record, name: str, where: str, dropped: Counter[str]) -> Record | None:
    chats: list[list[Message]] = []
    for key in ("chosen", "rejected"):
        text = text_of(need(record, key, name, where), key, where)
        before, *turns = HH_TURN.split(text)
        if before or turns[0] != "Human":
            raise UserError(f"{where}: {key} must begin with '\\n\\nHuman:', not {show(text[:40])}")
        chat = zip(turns[::2], turns[1::2], strict=True)
        chats.append([{"role": HH_ROLES[who], "content": said.removeprefix(" ")} for who, said in chat])
    prompt, chosen, rejected = _last_turns(chats[0], chats[1], where)
    return _best(record, name, where, prompt, [(1, chosen), (0, rejected)], dropped)


def _scored(record: Record, name: str, where: str, score: str, text: str, read: Read) -> list[tuple[float, Answer]]:
    """Score and answer of each of the record's completions."""
    value = need(record, "completions", name, where)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{where}: completions must be a list of at least two objects, not {show(value)}")
    return [
        (_number(one, score, name, where), read(need(one, text, name, where), f"completions[{index}].{text}", where))
        for index, one in enumerate(value)
    ]


def _best(
    record: Record, name: str, where: str, prompt: object, scored: list[tuple[float, Answer]], dropped: Counter[str]
) -> Record | None:
    """All answers of the best score against all below it; one that repeats a better one's text is no preference."""
    best = max(score for score, _ in scored)
    chosen = [text for score, text in scored if score == best]
    below = [text for score, text in scored if score < best]
    rejected = [text for text in below if plain(text) not in map(plain, chosen)]
    if not rejected:
        dropped["identical answers" if below else "equal scores"] += 1
        return None
    if len(rejected) < len(below):
        dropped["an answer that repeats a better one"] += len(below) - len(rejected)
    return _row(record, name, where, prompt, chosen, rejected)


def _ranked(record: Record, name: str, where: str, dropped: Counter[str]) -> Record | None:
    prompt = messages_of(need(record, "context", name, where), "context", where)
    scored = _scored(record, name, where, "rank", "completion", _answer)
    return _best(record, name, where, prompt, [(-rank, text) for rank, text in scored], dropped)


def _ultrafeedback(record: Record, name: str, where: str, dropped: Counter[str]) -> Record | None:
    prompt = text_of(need(record, "instruction", name, where), "instruction", where)
    scored = _scored(record, name, where, "overall_score", "response", text_of)
    return _best(record, name, where, prompt, scored, dropped)


def _labelled(record: Record, name: str, where: str, dropped: Counter[str]) -> Record:
    """Two answers, and a label that says whether the first or the second is better."""
    keys, labels = LABELLED[name]
    prompt, *answers = (text_of(need(record, key, name, where), key, where) for key in keys)
    label = need(record, "label", name, where)
    if label not in labels or isinstance(label, bool):
        raise UserError(f"{where}: label is {show(label)}; allowed are {labels[0]} and {labels[1]}")
    if name == "judgebench":
        record = {"id": record.get("pair_id"), "subset": record.get("source")} | record
    better = labels.index(label)
    return _row(record, name, where, prompt, [answers[better]], [answers[1 - better]])


def _rmbench(record: Record, name: str, where: str, dropped: Counter[str]) -> Record:
    """Its domain is the subset; a row's answers stand in the order of its three styles."""
    return record | {"id": str(need(record, "id", name, where)), "subset": need(record, "domain", name, where)}


FORMATS: dict[str, Format] = {
    "judgebench": Format(
        _has(*JUDGEBENCH), _labelled, '{"pair_id"?, "source"?, "question", "response_A", "response_B", "label": "A>B"}'
    ),
    "llmbar": Format(_has(*LLMBAR), _labelled, '{"input", "output_1", "output_2", "label": 1}'),
    "rmbench": Format(_is_rmbench, _rmbench, '{"id", "prompt", "chosen": [], "rejected": [], "domain"}'),
    "together": Format(
        _has(*TOGETHER[1:]), _together, '{"input": {"messages"}, "preferred_output", "non_preferred_output"}'
    ),
    "rb2": Format(
        _has(*RB2), _rb2, '{"id", "subset", "prompt", "chosen": [], "rejected": [], "num_correct", "num_incorrect"}'
    ),
    "ours": Format(_is_ours, lambda record, *_: record, '{"id", "subset", "prompt", "chosen", "rejected"}'),
    "ranked": Format(_has("context"), _ranked, '{"context": [], "completions": [{"rank", "completion"}, ...]}'),
    "ultrafeedback": Format(
        _has("completions"), _ultrafeedback, '{"instruction", "completions": [{"response", "overall_score"}, ...]}'
    ),
    "binarized": Format(
        _has(*SCORES[0], *SCORES[1]), _binarized, '{"prompt"?, "chosen", "rejected", "score_chosen", "score_rejected"}'
    ),
    "hh": Format(_is_hh, _hh, '{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": the same}'),
    "trl": Format(_has("prompt"), _trl, '{"prompt", "chosen", "rejected"} of texts or messages'),
    "implicit": Format(_has("chosen", "rejected"), _trl, '{"chosen", "rejected"} of whole chats or texts'),
}
