"""Claims about reading, checking and writing preference rows."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dpo.rows import PairValues, Row, columns_of, normalise, pairs_of, prompt_key, read_rows, values_of, write_rows
from models.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
GOOD: dict[str, object] = {"id": "a", "subset": "Math", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4"]}


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path)
    return str(caught.value)


def test_a_plain_row_is_read_with_its_line_and_without_its_extra_keys(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", GOOD, "", {**GOOD, "id": "b", "source": "x", "meta": {"k": 1}})
    first, second = read_rows(path)
    assert (first.id, first.subset, first.chosen, first.rejected) == ("a", "Math", ("2",), ("3", "4"))
    assert first.prompt == ({"role": "user", "content": "1 + 1?"},)
    assert (first.split, first.where, second.where) == (None, "r.jsonl:1", "r.jsonl:3")


def test_a_bare_answer_is_one_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {**GOOD, "chosen": "two", "rejected": "three"})
    assert (read_rows(path)[0].chosen, read_rows(path)[0].rejected) == (("two",), ("three",))


def test_messages_group_and_split_are_kept(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": "" if role == "system" else role} for role in roles]
    row = read_rows(write_lines(tmp_path / "r.jsonl", {**GOOD, "prompt": messages, "group": "g", "split": "test"}))[0]
    assert (list(row.prompt), row.group, row.split) == (messages, "g", "test")


def test_a_reference_answer_is_kept_and_survives_a_round_trip(tmp_path: Path) -> None:
    record = {"id": "a", "subset": "s", "prompt": "1 + 1?", "chosen": "2", "rejected": "3", "reference_answer": "two"}
    for path, more in (
        (tmp_path / "ours.jsonl", {}),
        (tmp_path / "scored.jsonl", {"score_chosen": 2, "score_rejected": 1}),
    ):
        path.write_text(json.dumps(record | more))
        [row] = rows = read_rows(path, "binarized" if more else "ours")
        write_rows(tmp_path / "again.jsonl", rows)
        assert row.reference_answer == "two" and read_rows(tmp_path / "again.jsonl") == rows
    (tmp_path / "bad.jsonl").write_text(json.dumps(record | {"reference_answer": 2}))
    with pytest.raises(UserError, match="bad.jsonl:1: reference_answer must be a text, not 2"):
        read_rows(tmp_path / "bad.jsonl")


def test_the_default_group_is_the_normalised_prompt(tmp_path: Path) -> None:
    prompts = ["Why IS it, so?", "why is it so", "Why is it not so?"]
    path = write_lines(tmp_path / "r.jsonl", *({**GOOD, "id": text, "prompt": text} for text in prompts))
    first, same, other = (row.group for row in read_rows(path))
    assert first == same != other


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"  # str.splitlines would cut here
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**GOOD, "prompt": text}, ensure_ascii=False), encoding="utf-8")
    assert read_rows(path)[0].prompt[0]["content"] == text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "b", ', "not a JSON object"),
        ("[1, 2]", "a row is a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        *(({key: value for key, value in GOOD.items() if key != left}, f"'{left}' is missing") for left in GOOD),
        *(({**GOOD, key: None}, f"'{key}' is missing or null") for key in GOOD),
        ({**GOOD, "id": 7}, "id must be a text, not 7"),
        ({**GOOD, "subset": " "}, "subset is empty"),
        ({**GOOD, "group": 7}, "group must be a text"),
        ({**GOOD, "prompt": 7}, "prompt must be a text or a list of messages"),
        ({**GOOD, "prompt": []}, "prompt must be a text or a list of messages"),
        ({**GOOD, "prompt": "\n"}, "prompt is empty"),
        ({**GOOD, "prompt": ["hi"]}, "prompt[0] must have the keys role and content"),
        ({**GOOD, "prompt": [{"role": "user", "content": "x", "name": "y"}]}, "prompt[0] must have the keys"),
        ({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}, "role 'tool'; allowed are system, user, assistant"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "prompt[0].content must be a text"),
        ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, "prompt[0].content is empty"),
        (
            {**GOOD, "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "the last message of prompt is from 'assistant'",
        ),
        ({**GOOD, "chosen": 2}, "chosen must be a text or a list of texts"),
        ({**GOOD, "chosen": []}, "chosen is an empty list"),
        ({**GOOD, "rejected": []}, "rejected is an empty list"),
        ({**GOOD, "rejected": ["3", 4]}, "rejected[1] must be a text"),
        ({**GOOD, "rejected": ["3", " \n"]}, "rejected[1] is empty"),
        ({**GOOD, "rejected": ""}, "rejected[0] is empty"),
        ({**GOOD, "chosen": ["the  same\n"], "rejected": ["3", " the same"]}, "the same answer is chosen and rejected"),
        ({**GOOD, "split": "dev"}, "split is 'dev'; allowed are train, validation, test"),
        ({**GOOD, "split": ["test"]}, "split is ['test']"),
        ({**GOOD, "chosen": ["half \ud800"]}, "half of a surrogate pair"),
        ({**GOOD, "weight": 0}, "weight is 0; it must be a number above 0"),
        ({**GOOD, "weight": [1, -1]}, "weight is -1;"),
        ({**GOOD, "weight": True}, "weight is True;"),
        ({**GOOD, "weight": [1.0]}, "weight has 1 numbers for 2 pairs; give one a pair or one for all"),
        ({**GOOD, "margin": "big"}, "margin is 'big'; it must be a number between"),
        ({**GOOD, "margin": [0.5, None]}, "margin is None;"),
        ({**GOOD, "margin": float("nan")}, "NaN is no JSON number"),
        ({**GOOD, "margin": float("inf")}, "Infinity is no JSON number"),
        ({**GOOD, "weight": 10**400}, "weight is 1000"),
        ({**GOOD, "soft_label": 0.4}, "soft_label is 0.4; it must be a number from 0.5 to 1 (below 0.5, exchange the"),
        ({**GOOD, "soft_label": 1.01}, "soft_label is 1.01;"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_line_and_fault(tmp_path: Path, line: object, expected: str) -> None:
    message = complaint(write_lines(tmp_path / "r.jsonl", {**GOOD, "id": "good"}, line))
    assert message.startswith("r.jsonl:2: ") and expected in message
    assert len(message) < 300, "a message quotes a value shortly"


def test_weight_margin_and_soft_label_are_one_for_all_pairs_or_one_each(tmp_path: Path) -> None:
    lines = [
        {**GOOD, "id": "1", "weight": 2, "soft_label": [0.5, 1]},
        {**GOOD, "id": "2", "margin": [-1, 0.5], "weight": None},
        {**GOOD, "id": "3"},
        {**GOOD, "id": "4", "weight": 1.0},
    ]
    rows = read_rows(write_lines(tmp_path / "r.jsonl", *lines))
    assert rows[0].pair_values == (PairValues(2.0, 0.0, 0.5), PairValues(2.0, 0.0, 1.0))
    assert (values_of(rows[1], 0, 0).margin, values_of(rows[1], 0, 1)) == (-1.0, PairValues(margin=0.5))
    assert rows[2].pair_values == () and values_of(rows[2], 0, 1) == PairValues()
    assert [columns_of([row]) for row in rows] == [{"weight", "soft_label"}, {"margin"}, set(), set()]
    assert read_rows(write_parquet(tmp_path / "r.parquet", [{**GOOD, "weight": [0.5, 2.0]}]))[0].pair_values == (
        PairValues(0.5),
        PairValues(2.0),
    )


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    message = complaint(write_lines(tmp_path / "r.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD))
    assert message.startswith("r.jsonl:3: id 'a'") and "r.jsonl:1" in message


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    assert complaint(path).startswith("r.jsonl:2: not UTF-8 (byte 9 of the line)")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("missing.parquet", None, "there is no such file"),
        ("empty.jsonl", b"", "there are no rows"),
        ("blank.jsonl", b"\n \n", "there are no rows"),
        ("empty.parquet", b"", "not a readable parquet file"),
        ("text.parquet", b"not parquet at all", "not a readable parquet file"),
        ("rows.txt", b"id,prompt", "a row file ends in .jsonl, .json, .parquet, .csv, or one of these and .gz or .zst"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = complaint(tmp_path / name)
    assert name in message and expected in message


def test_a_folder_is_no_row_file(tmp_path: Path) -> None:
    for name in ("folder.jsonl", "folder.parquet"):
        (tmp_path / name).mkdir()
        assert name in complaint(tmp_path / name)


def write_parquet(path: Path, records: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


REWARDBENCH2: dict[str, object] = {
    "id": "ref:1",
    "prompt": "Name a colour of the rainbow.",
    "chosen": ["Red", "Blue"],
    "rejected": ["Brown", "Pink", "Grey"],
    "num_correct": 2,
    "num_incorrect": 3,
    "total_completions": 5,
    "models": ["m"],
    "subset": "Ties",
    "additional_metadata": {"category": "x"},
}


def test_rewardbench2_parquet_equals_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    records = [{**REWARDBENCH2, "id": f"ref:{n}", "prompt": f"Name a colour, {n}"} for n in range(3)]
    from_parquet = read_rows(write_parquet(tmp_path / "rb2.parquet", records))
    assert from_parquet == read_rows(write_lines(tmp_path / "rb2.jsonl", *records))
    assert [row.where for row in from_parquet] == ["rb2.parquet:1", "rb2.parquet:2", "rb2.parquet:3"]


def test_parquet_faults_are_named_like_those_of_jsonl(tmp_path: Path) -> None:
    good: dict[str, object] = {**REWARDBENCH2, "id": "good"}
    message = complaint(write_parquet(tmp_path / "r.parquet", [good, {**REWARDBENCH2, "rejected": []}]))
    assert message.startswith("r.parquet:2: rejected must be a list of num_incorrect = 3 texts, not []")
    columns = {key: value for key, value in good.items() if key != "subset"}
    assert complaint(write_parquet(tmp_path / "c.parquet", [columns])).startswith(
        "c.parquet:1: key 'subset' is missing"
    )


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "r.parquet", [{**REWARDBENCH2, "id": "good"}])
    path.write_bytes(path.read_bytes().replace(b"good", b"g\xff\xffd"))
    assert complaint(path).startswith(f"data.path={path}: cannot be read (not a readable parquet file: ")


def test_written_rows_are_read_back_equal(tmp_path: Path) -> None:
    system = ({"role": "system", "content": ""}, {"role": "user", "content": '¿Qué?\u2028\n\t"x"'})
    rows = [
        Row("1", "s", ({"role": "user", "content": "plain"},), ("a", "b"), ("c",), "g", "train", "elsewhere:9"),
        Row("2", "s", system, ("日本",), ("c", "\\ud800"), "prompt:0"),
        Row("3", "s", system, ("a",), ("b", "c"), "g", pair_values=(PairValues(0.1, -2.0, 0.7), PairValues())),
    ]
    write_rows(tmp_path / "out.jsonl", rows)
    assert read_rows(tmp_path / "out.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out.jsonl", GOOD)
    broken = Row("1", "s", ({"role": "user", "content": "plain"},), ("\ud800",), ("c",), "g")
    with pytest.raises(UnicodeEncodeError):
        write_rows(path, [broken])
    assert len(read_rows(path)) == 1 and [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_pairs_are_chosen_major_and_the_first_k_are_taken() -> None:
    row = Row("1", "s", (), ("a", "b"), ("c", "d", "e"), "g")
    everything = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert pairs_of(row, 0) == everything
    assert [pairs_of(row, k) for k in (1, 4, 99)] == [everything[:1], everything[:4], everything]


def test_normalised_text_keeps_letters_and_digits_of_every_script() -> None:
    assert normalise("  Don't_STOP—now!\n¿Ça va, 3x? Привет 日本語 ") == "don t stop now ça va 3x привет 日本語"
    assert prompt_key([{"role": "system", "content": "A."}, {"role": "user", "content": "B?"}]) == "a b"


@pytest.mark.skipif(not DATA.is_dir(), reason="the development data is not here")
@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda path: path.stem)
def test_real_rows_are_read_whole_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    rows = read_rows(path)
    records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert [(row.id, list(row.chosen), list(row.rejected)) for row in rows] == [
        (record["id"], record["chosen"], record["rejected"]) for record in records
    ]
    write_rows(tmp_path / "copy.jsonl", rows)
    assert read_rows(tmp_path / "copy.jsonl") == rows
