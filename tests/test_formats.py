"""Claims about reading other people's preference files: every format, every container, nothing dropped in silence."""

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from dpo.config import DataConfig
from dpo.formats import FORMATS, SCORES
from dpo.inputs import load_splits
from dpo.rows import Row, iterate_rows, pairs_of, read_rows, write_rows
from dpo.settings import load_config
from models.errors import UserError
from tests.foreign_rows import CONTAINERS, ONE_TEXT, WRITERS, Record, as_jsonl, said, write

DATA = Path(__file__).parents[2] / "shared" / "data"
Pair = tuple[tuple[tuple[str, str], ...], str, str]  # the prompt's (role, content)s, chosen, rejected


def made_rows(seed: int = 0, count: int = 20) -> list[Row]:
    """Rows of several turns, with the characters that readers stumble over."""
    draw = random.Random(seed)
    odd = ["\u2028", '"', "\\", ",", "\r\n", "é", "日本", "\t", "{}", "[1]", "😀", "\x85", "'"]
    text = lambda: " ".join(draw.choice([*odd, "word", "an", "42"]) for _ in range(draw.randint(2, 9))).strip() + "."  # noqa: E731
    rows = []
    for number in range(count):
        earlier = (said("user", text()), said("assistant", text())) if number % 3 == 0 else ()
        prompt = (*earlier, said("user", f"{number} {text()}"))
        answers = [f"{name}{i} {text()}" for i, name in enumerate(("a", "b", "c"))]
        rows.append(Row(f"r{number}", "s", prompt, (answers[0],), tuple(answers[1 : 2 + number % 2]), "g"))
    return rows


def pairs(rows: list[Row]) -> list[Pair]:
    return [
        (tuple((message["role"], message["content"]) for message in row.prompt), row.chosen[i], row.rejected[j])
        for row in rows
        for i, j in pairs_of(row, 0)
    ]


def split_pairs(rows: list[Row]) -> list[Row]:
    """One row a pair: what a format of single pairs can hold."""
    return [
        Row(f"{row.id}.{i}.{j}", row.subset, row.prompt, (row.chosen[i],), (row.rejected[j],), row.group)
        for row in rows
        for i, j in pairs_of(row, 0)
    ]


def complaint(path: Path, *records: object, format: str = "auto") -> str:
    path.write_bytes(as_jsonl(list(records)))  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        read_rows(path, format)
    return str(caught.value)


def first_of(shape: str) -> Record:
    row = next(row for row in made_rows() if len(row.prompt) == 1)
    return WRITERS[shape][1](row, "a right answer", "the wrong one")


@pytest.mark.parametrize("shape", WRITERS)
def test_the_same_pairs_come_back_from_every_format_recognised_or_named(shape: str, tmp_path: Path) -> None:
    format, writer = WRITERS[shape]
    rows = [row for row in split_pairs(made_rows()) if len(row.prompt) == 1 or shape not in ONE_TEXT]
    path = write(tmp_path / "r.jsonl", [writer(row, row.chosen[0], row.rejected[0]) for row in rows])
    back = read_rows(path)
    expected = pairs(rows)
    if shape == "implicit_text":
        expected = [
            (((role, f"{prompt}\n"),), f"+{chosen}", f"-{rejected}") for ((role, prompt),), chosen, rejected in expected
        ]
    assert pairs(back) == expected
    assert read_rows(path, format) == read_rows(path)
    if shape not in ("ours", "rb2", "rmbench"):
        assert [(row.id, row.where, row.subset) for row in back[:2]] == [
            ("r.jsonl:1", "r.jsonl:1", format), ("r.jsonl:2", "r.jsonl:2", format)
        ]  # fmt: skip


def test_judgebenchs_and_rm_benchs_own_names_are_ids_and_subsets(tmp_path: Path) -> None:
    named = {"judgebench": {"pair_id": "p7", "source": "mmlu-pro-law"}, "rmbench": {"id": 7, "domain": "code"}}
    for shape, names in named.items():
        [row] = read_rows(write(tmp_path / f"{shape}.jsonl", [first_of(shape) | names]))
        assert (row.id, row.subset) == tuple(map(str, names.values()))


@pytest.mark.parametrize("called", ["thinking", "reasoning_content", "reasoning"])
def test_what_was_thought_before_an_answer_comes_with_it_from_every_format_of_messages(
    called: str, tmp_path: Path
) -> None:
    thinks = said("assistant", "4") | {called: "2 + 2"}
    prompt = [said("user", "1 + 1?"), said("assistant", "2") | {called: "1, 2"}, said("user", "2 + 2?")]
    plain, unthought = said("assistant", "5"), said("assistant", "5") | {called: None}
    records: list[Record] = [
        {"id": "r", "subset": "s", "prompt": prompt, "chosen": [thinks], "rejected": ["5", "6"]},
        {"prompt": prompt, "chosen": [thinks], "rejected": [unthought]},
        {"chosen": [*prompt, thinks], "rejected": [*prompt, plain]},
        {"chosen": [*prompt, thinks], "rejected": [*prompt, plain], "score_chosen": 2, "score_rejected": 1},
        {
            "context": prompt,
            "completions": [{"rank": rank, "completion": [x]} for rank, x in enumerate((thinks, plain))],
        },
        {"input": {"messages": prompt}, "preferred_output": [thinks], "non_preferred_output": [plain]},
    ]
    for record in records:
        (row,) = read_rows(write(tmp_path / "r.jsonl", [record]))
        assert (row.chosen, row.rejected[0], row.thinking) == (("4",), "5", (("4", "2 + 2"),))
        assert row.prompt[1] == {"role": "assistant", "content": "2", "thinking": "1, 2"}
        write_rows(tmp_path / "back.jsonl", [row])
        assert read_rows(tmp_path / "back.jsonl") == [row]


def test_thinking_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    path, thinks = tmp_path / "r.jsonl", said("assistant", "4") | {"thinking": "2 + 2"}
    row = {"id": "r", "subset": "s", "prompt": "2 + 2?", "chosen": [thinks], "rejected": "5"}
    for changes, expected in (
        ({"chosen": [thinks | {"reasoning": "3 + 1"}]}, "chosen[0] has thinking and reasoning; allowed is one thought"),
        ({"chosen": [thinks | {"thinking": " "}]}, "chosen[0].thinking is empty"),
        ({"chosen": [thinks | {"thinking": 4}]}, "chosen[0].thinking must be a text, not 4"),
        (
            {"chosen": [thinks | {"role": "user"}]},
            "chosen[0] has thinking; allowed is one thought, and only of 'assistant'",
        ),
        ({"chosen": [said("user", "4")]}, "chosen[0] is a message from 'user'; an answer is from 'assistant'"),
        ({"chosen": [thinks, "4"]}, "chosen[1] repeats an answer with other thinking: '4'"),
        ({"rejected": ["4"]}, "rejected[0] repeats an answer with other thinking: '4'"),
        ({"prompt": [said("user", "?") | {"thinking": "hm"}]}, "prompt[0] has thinking; allowed is one thought"),
    ):
        assert expected in complaint(path, row | changes)


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_holds_the_same_rows(container: str, codec: str, tmp_path: Path) -> None:
    rows = [row for row in split_pairs(made_rows()) if len(row.prompt) == 1]
    shapes = [shape for shape in WRITERS if container != ".csv" or shape in ("trl", "hh", "implicit_text")]
    for shape in shapes:
        records = [WRITERS[shape][1](row, row.chosen[0], row.rejected[0]) for row in rows]
        plain = read_rows(write(tmp_path / "plain.jsonl", records))
        assert pairs(read_rows(write(tmp_path / f"rows{container}{codec}", records))) == pairs(plain), shape


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows = split_pairs(made_rows())
    records = [WRITERS["together"][1](row, row.chosen[0], row.rejected[0]) for row in rows]
    for name, part in (("b.jsonl.gz", records[9:]), ("a/z.jsonl.gz", records[:9]), (".hidden/x.jsonl.gz", records)):
        write(tmp_path / "shards" / name, part)
    (tmp_path / "shards" / "README.md").write_text("# About\n")
    back = read_rows(tmp_path / "shards")
    assert pairs(back) == pairs(rows)
    assert (back[0].id, back[9].id) == ("a/z.jsonl.gz:1", "b.jsonl.gz:1")
    write(tmp_path / "shards" / "c.parquet", records)
    with pytest.raises(UserError, match=r"holds .jsonl and .parquet files; name a folder of one kind"):
        read_rows(tmp_path / "shards")


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "test.jsonl"), ("train/0.jsonl", "validation/0.jsonl"), ("d/test-0.jsonl", "d/train-0.jsonl")],
)
def test_a_folder_of_several_splits_is_refused_and_of_one_is_read(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / "both" / name, [first_of("trl")])
    with pytest.raises(UserError, match="files of the splits t.*, which would be mixed; name one of them"):
        read_rows(tmp_path / "both")
    write(tmp_path / "one" / names[0], [first_of("trl")])
    write(tmp_path / "one" / "more" / "trainer.jsonl", [first_of("trl")])
    assert len(read_rows(tmp_path / "one")) == 2


def test_rows_stream_and_do_not_wait_for_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(as_jsonl([first_of("trl")] * 3) + b"broken\n")
    rows = iterate_rows(path, "auto", Counter())
    assert [next(rows).id for _ in range(3)] == ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]
    with pytest.raises(UserError, match="r.jsonl:4: not a JSON object"):
        next(rows)


def test_the_formats_of_the_config_are_those_that_are_read() -> None:
    assert get_args(DataConfig.model_fields["format"].annotation) == ("auto", *FORMATS)


@pytest.mark.parametrize("other", WRITERS)
@pytest.mark.parametrize("shape", WRITERS)
def test_a_mixture_of_formats_is_an_error_that_names_both_lines(shape: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    if WRITERS[shape][0] != WRITERS[other][0]:
        message = complaint(path, first_of(shape), first_of(other))
        names = f"looks like the format {WRITERS[other][0]}, but r.jsonl:1 like {WRITERS[shape][0]}"
        assert message.startswith("r.jsonl:2: ") and names in message


DROPPED: dict[str, tuple[Record, str]] = {
    "equal scores, binarized": (first_of("binarized") | {"score_rejected": 8.5}, "equal scores"),
    "the same answer twice, binarized": (
        first_of("binarized") | {"rejected": first_of("binarized")["chosen"]},
        "identical answers",
    ),
    "the same answer twice, hh": (first_of("hh") | {"rejected": first_of("hh")["chosen"]}, "identical answers"),
    "equal ranks": (
        first_of("ranked")
        | {"completions": [{"rank": 1, "completion": [said("assistant", text)]} for text in ("x", "y")]},
        "equal scores",
    ),
    "the best answer repeated below": (
        first_of("ultrafeedback")
        | {"completions": [{"response": "x", "overall_score": 1}, {"response": " x\n", "overall_score": 2.0}]},
        "identical answers",
    ),
}


@pytest.mark.parametrize(("record", "reason"), DROPPED.values(), ids=DROPPED)
def test_a_row_without_a_preference_is_dropped_and_counted(record: Record, reason: str, tmp_path: Path) -> None:
    shape = next(
        shape for shape in ("binarized", "hh", "ranked", "ultrafeedback") if record.keys() == first_of(shape).keys()
    )
    path = tmp_path / "r.jsonl"
    path.write_bytes(as_jsonl([record, first_of(shape), record]))
    dropped: Counter[str] = Counter()
    rows = read_rows(path, "auto", dropped)
    assert ([row.id for row in rows], dropped) == (["r.jsonl:2"], {reason: 2})
    assert "there are no rows, but for 1 dropped ones" in complaint(path, record)


def test_what_was_dropped_is_in_the_splits_report(tmp_path: Path) -> None:
    rows = split_pairs(made_rows())
    good = [WRITERS["binarized"][1](row, row.chosen[0], row.rejected[0]) for row in rows]
    path = write(tmp_path / "r.json", [*good, *(record | {"score_rejected": 8.5} for record in good[:2])])
    config = load_config(["exp=verdicts", f"data.path={path}"])
    splits = load_splits(config)
    assert splits.report["dropped"] == {"equal scores": 2}
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == len(rows)
    with pytest.raises(UserError, match="r.json:2: key 'input' is missing|found the extra column"):
        load_splits(load_config(["exp=verdicts", f"data.path={path}", "data.format=together"]))
    with pytest.raises(UserError, match="data.format = .trl. .*: checkable rows are made here"):
        load_config(["exp=verdicts", "data.path=checkable", "data.format=trl"])


def test_scores_make_all_best_answers_chosen_and_all_below_them_rejected(tmp_path: Path) -> None:
    answers = [("best", 8), ("worst", 1.5), ("as good", 8.0), ("good", 7.75), ("best ", 3)]
    completions = [{"response": text, "overall_score": score} for text, score in answers]
    dropped: Counter[str] = Counter()
    row = read_rows(write(tmp_path / "r.jsonl", [{"instruction": "?", "completions": completions}]), "auto", dropped)[0]
    assert (row.chosen, row.rejected) == (("best", "as good"), ("worst", "good"))
    assert dropped == {"an answer that repeats a better one": 1}


def test_texts_without_a_prompt_share_it_up_to_the_last_common_word(tmp_path: Path) -> None:
    texts = [
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # TRL would cut "bl" off
        ("Q: 1+1?\nA: 2", "Q: 1+1?\nA: 3", ("Q: 1+1?\nA:", " 2", " 3")),
        ("Q?\n\n2", "Q?\n\n3", ("Q?\n\n", "2", "3")),
        ("one two", "one two three", ("one", " two", " two three")),
    ]
    path = write(tmp_path / "r.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in texts])
    found = [(row.prompt[0]["content"], row.chosen[0], row.rejected[0]) for row in read_rows(path)]
    assert found == [expected for _, _, expected in texts]


def test_a_foreign_row_with_an_id_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Tulu's preference rows: a prompt beside whole chats, and an id."""
    ask = {"role": "user", "content": "2 + 2?"}
    chats = [[ask, {"role": "assistant", "content": text}] for text in ("4", "5")]
    tulu = {"id": "t1", "source": "x", "prompt": "2 + 2?", "chosen": chats[0], "rejected": chats[1]}
    row = read_rows(write(tmp_path / "r.jsonl", [tulu]))[0]
    assert (row.id, row.prompt, row.chosen, row.rejected) == ("t1", (ask,), ("4",), ("5",))


def test_what_a_foreign_row_says_in_our_keys_is_kept(tmp_path: Path) -> None:
    more = {"group": "g", "split": "test", "margin": 0.5, "other": 1}
    row = read_rows(write(tmp_path / "r.jsonl", [first_of("trl") | more]))[0]
    assert (row.group, row.split, row.pair_values[0].margin) == ("g", "test", 0.5)
    forced = read_rows(write(tmp_path / "r.jsonl", [first_of("trl") | {"id": "x", "subset": "s"}]), "trl")[0]
    assert (forced.id, forced.subset) == ("x", "s")


def test_the_two_rows_of_a_ties_question_are_one_group(tmp_path: Path) -> None:
    ties = [first_of("rb2") | {"id": name, "subset": "Ties"} for name in ("ref:7", "tied:7", "tied:8")]
    first, second, other = read_rows(write(tmp_path / "r.parquet", ties))
    assert first.group == second.group != other.group


def turns(*texts: str) -> list[dict[str, str]]:
    return [said(role, text) for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


def together_with(messages: object, **input: object) -> Record:
    return first_of("together") | {"input": {"messages": messages, **input}}


FAULTS: dict[str, tuple[str, Record, str]] = {
    "a key of together": (
        "together",
        {"preferred_output": None},
        "key 'preferred_output' is missing or null; a row of",
    ),
    "an extra column": ("together", {"metadata": 1}, "found the extra column 'metadata'; allowed are input"),
    "no input object": ("together", {"input": []}, "input must be an object with the key messages"),
    "no messages": ("together", {"input": {}}, "input must be an object with the key messages"),
    "messages no list": ("together", together_with("hi"), "input.messages must be a list of messages"),
    "a message no object": ("together", together_with(["hi"]), "input.messages[0] must have the keys role and content"),
    "a message without content": ("together", together_with([{"role": "user"}]), "must have the keys role and content"),
    "a content no text": ("together", together_with([said("user", 1)]), "input.messages[0].content must be a text"),  # type: ignore[arg-type]
    "an unknown role": ("together", together_with([said("tool", "x")]), "role 'tool'; allowed are system, user"),
    "two equal roles": ("together", together_with([said("user", "x")] * 2), "two in a row from 'user'; roles must alt"),
    "an assistant last": ("together", together_with(turns("x", "y")), "the last message of prompt is from 'assistant'"),
    "a bad weight": (
        "together",
        together_with([said("user", "x") | {"weight": 2}]),
        "[0].weight is 2; allowed are (0, 1)",
    ),
    "a true weight": ("together", together_with([said("user", "x") | {"weight": True}]), "weight is True; allowed"),
    "tools": ("together", together_with(turns("x"), tools=[{}]), "input.tools would change the prompt"),
    "two answers": (
        "together",
        {"preferred_output": turns("x", "y")},
        "preferred_output must hold exactly one message",
    ),
    "no answer": ("together", {"non_preferred_output": []}, "non_preferred_output must be a list of messages"),
    "a user's answer": (
        "together",
        {"preferred_output": turns("x")},
        "must hold exactly one message, from 'assistant'",
    ),
    "an untrained answer": (
        "together",
        {"preferred_output": [said("assistant", "x") | {"weight": 0}]},
        "preferred_output[0].weight is 0; allowed are (1,)",
    ),
    "a single completion": ("ranked", {"completions": [{}]}, "completions must be a list of at least two objects"),
    "no rank": ("ranked", {"completions": [{}, {}]}, "key 'rank' is missing or null; a row of the format ranked is"),
    "a score as text": (
        "ultrafeedback",
        {"completions": [{"response": "x", "overall_score": "8"}] * 2},
        "overall_score is '8'; it must be a number",
    ),
    "scores the wrong way": ("binarized", {"score_rejected": 9}, "score_chosen is below score_rejected: 8.5 < 9"),
    "one score": ("binarized", {"score_rejected": None}, "key 'score_rejected' is missing or null"),
    "another prompt": ("binarized", {"prompt": "other"}, "prompt is not the last message before the answer in chosen"),
    "no chat in common": (
        "implicit_chat",
        {"chosen": turns("x", "y")},
        "must share all messages but the last, at least",
    ),
    "a chat of one": (
        "implicit_chat",
        dict.fromkeys(("chosen", "rejected"), turns("x")),
        "must share all messages but",
    ),
    "a user last": (
        "implicit_chat",
        {"chosen": turns("x", "y", "z"), "rejected": turns("x", "y", "w")},
        "the last messages of chosen and rejected must be from 'assistant'",
    ),
    "nothing in common": ("implicit_text", {"chosen": "a b", "rejected": "b a"}, "do not begin with a common one"),
    "tools of TRL": ("trl_chat", {"tools": [{}]}, "tools would change the prompt and cannot be read"),
    "images of TRL": ("trl_chat", {"images": ["a.png"]}, "images would change the prompt and cannot be read"),
    "a system prompt": ("trl", {"system": "Speak French."}, "system would change the prompt and cannot be read"),
    "another key for the prompt": ("implicit_text", {"question": "x"}, "there is 'question' but no 'prompt': rename"),
    "one of our keys misspelt": ("trl", {"weigth": 2}, "the key 'weigth' is not read; is it 'weight'? Rename it, or"),
    "two letters swapped": ("trl", {"spilt": "test"}, "the key 'spilt' is not read; is it 'split'? Rename it, or"),
    "a capital": ("trl", {"Group": "a"}, "the key 'Group' is not read; is it 'group'? Rename it, or"),
    "a text against a number": ("trl", {"rejected": 7}, "chosen and rejected must be alike, not '"),
    "template arguments": ("trl", {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs would change the prompt"),
    "two answers of TRL": ("trl_chat", {"chosen": turns("x", "y")}, "chosen must hold exactly one message"),
    "a text for messages": ("trl_chat", {"chosen": "x"}, "chosen and rejected must be alike, not 'x' and [{"),
    "no text before hh": ("hh", {"chosen": "Hi\n\nHuman: x\n\nAssistant: y"}, "chosen must begin with '\\n\\nHuman:'"),
    "an hh answer missing": ("hh", {"rejected": "\n\nHuman: x"}, "must share all messages but the last"),
    "counts that do not fit": ("rb2", {"num_incorrect": 2}, "rejected must be a list of num_incorrect = 2 texts"),
    "a true score": ("binarized", {"score_rejected": True}, "score_rejected is True; it must be a number"),
    "more in a message": (
        "trl_chat",
        {"chosen": [said("assistant", "x") | {"name": "y"}]},
        "chosen[0] must have the keys role and content and no other",
    ),
    "an empty answer": ("trl", {"chosen": " "}, "chosen is empty"),
}


@pytest.mark.parametrize(("shape", "change", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_row_that_does_not_fit_is_named(shape: str, change: Record, expected: str, tmp_path: Path) -> None:
    message = complaint(tmp_path / "r.jsonl", first_of(shape), first_of(shape) | change)
    assert message.startswith("r.jsonl:2: ") and expected in message
    assert len(message) < 400


def test_an_unknown_row_is_told_what_is_known(tmp_path: Path) -> None:
    message = complaint(tmp_path / "r.jsonl", {"question": "?", "answer": "!"})
    assert message.startswith("r.jsonl:1: the keys ['answer', 'question'] are of no known format.")
    assert all(f"{name}: " in message for name in FORMATS)
    assert "data.format= forces another" in complaint(tmp_path / "r.jsonl", first_of("trl"), format="ranked")
    assert "has no key 'prompt'" in complaint(tmp_path / "r.jsonl", first_of("trl"), format="implicit")


JSON_FAULTS: dict[str, tuple[str, bytes, str]] = {
    "an object": (".json", b'{"id": "a"}', "r.json:1: not a JSON array of rows: '[' (a file with one row a line is a"),
    "an empty file": (".json", b"", "r.json:1: not a JSON array of rows"),
    "an open array": (".json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"}', "r.json:1: not a JSON array"),
    "a comma last": (".json", b'[\n{"prompt": "a"},\n]', "r.json:2: "),
    "more behind": (".json", b"[]\n\n7", "r.json:3: not a JSON array of rows: nothing more must stand here, not '7'"),
    "an empty array": (".json", b" [ ] ", "r.json: there are no rows"),
    "a broken row": (".json", b'[\n\n{"a": }]', "r.json:3: not a JSON object (Expecting value"),
    "bytes": (".json", b'[\n"\xff"]', "r.json:2: not UTF-8 (byte 4 of the file)"),
    "a key twice": (".jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}', "r.jsonl:1: not a JSON object (the key 'c' st"),
    "not a number": (".jsonl", b'{"a": NaN}', "r.jsonl:1: not a JSON object (NaN is no JSON number)"),
    "a space of others": (".jsonl", "\u2028".encode(), "r.jsonl:1: not a JSON object"),
    "a torn gz": (".jsonl.gz", b"\x1f\x8b\x08\x00", "r.jsonl.gz: cannot be read"),
    "no gz at all": (".jsonl.gz", b"plain text", "r.jsonl.gz: cannot be read"),
    "no zst at all": (".csv.zst", b"plain text", "r.csv.zst: cannot be read"),
    "no parquet in zst": (".parquet.zst", b"plain text", "r.parquet.zst: cannot be read"),
    "too few cells": (".csv", b"prompt,chosen,rejected\n\na,b\n", "r.csv:3: 2 cells for the 3 columns"),
    "an open quote": (".csv", b'prompt,chosen,rejected\na,"b,c\nd', "r.csv:2: not CSV (unexpected end of data)"),
    "a quote within": (".csv", b'prompt,chosen,rejected\na,"b"b,c\n', "r.csv:2: not CSV"),
    "a column twice": (".csv", b"prompt,chosen,chosen\na,b,c\n", "r.csv:1: the column 'chosen' stands twice"),
    "a number in words": (".csv", b"prompt,chosen,rejected,margin\na,b,c,big\n", "r.csv:2: margin must be a number"),
    "an empty cell": (".csv", b"prompt,chosen,rejected\na,,c\n", "r.csv:2: key 'chosen' is missing or null"),
    "a carriage return too many": (".csv", b"prompt,chosen,rejected\na,b,c\r\r\n", "r.csv:2: not CSV (a carriage"),
    "only a header": (".csv", b"prompt,chosen,rejected\n", "r.csv: there are no rows"),
}  # fmt: skip


@pytest.mark.parametrize(("ending", "data", "expected"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_a_broken_container_is_an_error_that_names_its_place(
    ending: str, data: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / f"r{ending}").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / f"r{ending}")
    assert expected in str(caught.value).replace(f"data.path={tmp_path}/", "")


def test_a_byte_order_mark_crlf_and_a_cell_of_many_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(
        b'\xef\xbb\xbfprompt,chosen,rejected,margin\r\n"a\nb","c ""d""",e,0.5\r\nf,g,h,\r\n'
    )
    first, second = read_rows(tmp_path / "r.csv")
    assert (first.prompt[0]["content"], first.chosen, first.pair_values[0].margin) == ("a\nb", ('c "d"',), 0.5)
    assert (first.id, second.id, second.pair_values) == ("r.csv:2", "r.csv:4", ())
    for ending, data in ((".jsonl", as_jsonl([first_of("trl")])), (".json", json.dumps([first_of("trl")]).encode())):
        (tmp_path / f"r{ending}").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
        assert len(read_rows(tmp_path / f"r{ending}")) == 1


@pytest.mark.parametrize("keys", SCORES)
def test_scores_in_a_csv_file_are_numbers_under_either_name(keys: tuple[str, str], tmp_path: Path) -> None:
    pair = {"prompt": "x", "chosen": "y", "rejected": "z"}
    rows = [pair | dict(zip(keys, scores, strict=True)) for scores in ((5.0, 2.5), (3, 3))]
    dropped: Counter[str] = Counter()
    (row,) = read_rows(write(tmp_path / "r.csv", rows), dropped=dropped)
    assert row.chosen == ("y",) and dropped == {"equal scores": 1}


def test_a_huge_cell_and_a_huge_line_are_read(tmp_path: Path) -> None:
    csv.field_size_limit(131072)  # the module's own, which a big answer passes
    record = first_of("trl") | {"chosen": "long " * 400_000}
    for ending in (".csv", ".jsonl", ".json"):
        assert len(read_rows(write(tmp_path / f"r{ending}", [record]))[0].chosen[0]) == 2_000_000


@pytest.mark.skipif(not DATA.is_dir(), reason="the development data is not here")
@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda path: path.stem)
def test_real_rows_come_back_from_every_format(path: Path, tmp_path: Path) -> None:
    rows = [row for row in split_pairs(read_rows(path)[::9]) if "\n\nHuman:" not in row.chosen[0] + row.rejected[0]][
        :150
    ]
    for shape, (_, writer) in WRITERS.items():
        if shape == "implicit_text":
            continue  # where a prompt ends is guessed there
        held = [
            row
            for row in rows
            if not (shape in ONE_TEXT and len(row.prompt) > 1)
            and not (
                shape == "hh" and "\n\nAssistant:" in "".join((row.prompt[-1]["content"], *row.chosen, *row.rejected))
            )
        ]
        copy = write(tmp_path / f"{shape}.jsonl.gz", [writer(row, row.chosen[0], row.rejected[0]) for row in held])
        assert pairs(read_rows(copy)) == pairs(held), shape


def test_a_domain_of_ones_own_makes_no_row_one_of_rm_bench(tmp_path: Path) -> None:
    rows = [{"subset": "Math", "id": "1", "chosen": ["a"], "rejected": ["b"]}, {"chosen": "a", "rejected": "b"}]
    for row, subset in zip(rows, ("Math", "trl"), strict=True):
        (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "x", "domain": "law"} | row))
        assert read_rows(tmp_path / "r.jsonl")[0].subset == subset


def test_an_array_on_one_line_and_text_answers_to_messages_are_read(tmp_path: Path) -> None:
    row = {"prompt": turns("x"), "chosen": "It is 1.", "rejected": "It is 7."}
    (tmp_path / "r.json").write_text(json.dumps([row, row | {"chosen": "1."}]))
    assert [row.id for row in read_rows(tmp_path / "r.json")] == ["r.json:1", "r.json:1:2"]
