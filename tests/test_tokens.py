"""dpo/tokens.py and the truncation of dpo/trees.py: stored once and found again, cut alike for all answers, counted."""

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

import dpo.tokens
import dpo.trees
from dpo.inputs import read_inputs
from dpo.rows import PairValues, Row, write_rows
from dpo.settings import load_config
from dpo.tokens import Trees, token_trees
from dpo.trees import Tree, TreeSettings, build_trees
from models.errors import UserError
from models.tokenizer import Tokenizer, load_tokenizer

DIALOGUE = (
    {"role": "system", "content": "Be brief — please."},
    {"role": "user", "content": "Hi, ¿qué tal? 🙂"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Translate: 日本語 🙂 " + "word " * 30},
)
VALUES = (PairValues(0.1, -2.5, 0.7), PairValues(3.0), PairValues())
ROWS = [
    Row("r1", "s", ({"role": "user", "content": "Name the second month."},), ("February.",), ("March.", "May"), "g"),
    Row("r2", "s", DIALOGUE, ("Japanese 🙂",), ("日本", "no", ""), "h", pair_values=VALUES),
]
RESPONSES = TreeSettings("responses", 0, "pair", 4096)
VERDICTS = dataclasses.replace(RESPONSES, objective="verdicts", pair_weight="row")


@pytest.fixture
def tokenizer(tiny_folder) -> Tokenizer:
    return load_tokenizer(tiny_folder)


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """The numbers of rows of all calls of build_trees in this process."""
    calls: list[int] = []

    def counting(rows, *rest):
        calls.append(len(rows))
        return build_trees(rows, *rest)

    monkeypatch.setattr(dpo.tokens, "build_trees", counting)
    return calls


def plain(rows, tokenizer: Tokenizer, settings: TreeSettings) -> list[Tree]:
    return [built.tree for built in build_trees(rows, tokenizer, settings)]


def many(count: int) -> list[Row]:
    return [dataclasses.replace(ROWS[i % 2], id=f"{i:05d}", rejected=(f"{i}", "b", "c")) for i in range(count)]


def store_of(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    return folder


# --- stored and found again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [RESPONSES, VERDICTS], ids=["responses", "verdicts"])
def test_stored_trees_are_those_that_were_built_to_the_last_bit(tmp_path, tokenizer, settings):
    rows = [*ROWS, dataclasses.replace(ROWS[0], id="r3", chosen=("February. " * 40,))]
    trees, built = token_trees(rows, tokenizer, settings, tmp_path), plain(rows, tokenizer, settings)
    assert bool(built[2].stems) == (settings == VERDICTS)  # there the long answer stands first in two questions
    assert list(trees) == built and trees[-1] == built[-1] and trees[:1] == built[:1] and trees[::-1] == built[::-1]
    assert trees.column("pairs") == [len(tree.pairs) for tree in built]
    assert [trees[1].key(c) for c in range(2)] == [built[1].key(c) for c in range(2)]
    with pytest.raises(IndexError):
        trees[3]


def test_rows_are_tokenised_once_and_found_again(tmp_path, tokenizer, tokenised):
    first, second = (token_trees(ROWS, tokenizer, RESPONSES, tmp_path) for _ in range(2))
    assert tokenised == [2] and list(first) == list(second) and first.digest == second.digest


def test_a_run_that_changes_what_no_tree_depends_on_tokenises_nothing(tmp_path, tokenised):
    def read(*settings: str) -> Trees:
        places = [f"run.cache={tmp_path / 'cache'}", f"run.root={tmp_path / 'runs'}", "model.path=tiny-random"]
        return read_inputs(load_config(["exp=smoke", *places, *settings]), "cpu").train_trees

    trees = read()
    assert sum(tokenised) > 0
    tokenised.clear()
    again = read("train.lr=1", "loss.beta=5", "loss.name=ipo", "train.epochs=3", "lora.rank=4", "dtype=fp64", "show=1")
    assert tokenised == [] and again.digest == trees.digest
    assert read("train.pair_weight=row", "checkable.rejected_per_row=3").digest != trees.digest and tokenised


def test_whatever_the_trees_depend_on_changes_their_address(tmp_path, tokenizer, tokenised, monkeypatch):
    def ask(rows=ROWS, tokenizer=tokenizer, settings=RESPONSES) -> int:
        tokenised.clear()
        token_trees(rows, tokenizer, settings, tmp_path / "cache")
        return sum(tokenised)

    assert ask() == 2 and ask() == 0
    assert ask(rows=[ROWS[0], dataclasses.replace(ROWS[1], chosen=("Japanese 🙁",))]) == 2
    assert ask(rows=[ROWS[0], dataclasses.replace(ROWS[1], pair_values=())]) == 2
    assert ask(rows=[ROWS[0], dataclasses.replace(ROWS[1], thinking=(("Japanese", "Hm."),))]) == 2
    assert ask(rows=[ROWS[0], dataclasses.replace(ROWS[1], reference_answer="Japanese")]) == 2
    assert ask(rows=ROWS[::-1]) == 2
    assert ask(rows=[dataclasses.replace(row, subset="other", where="elsewhere:1") for row in ROWS]) == 0
    assert ask(settings=dataclasses.replace(RESPONSES, pair_weight="row")) == 2
    assert ask(tokenizer=dataclasses.replace(tokenizer, variables={"enable_thinking": True})) == 2
    assert ask(tokenizer=dataclasses.replace(tokenizer, end_ids=tokenizer.end_ids | {0})) == 2  # config.json's
    other = tmp_path / "other"
    shutil.copytree(tokenizer.folder, other)
    assert ask(tokenizer=load_tokenizer(other)) == 0  # the content counts, not the place
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace("tiny random model", "small random model"))
    assert ask(tokenizer=load_tokenizer(other)) == 2
    monkeypatch.setattr(dpo.tokens, "CODE", (dpo.trees,))  # other code
    assert ask() == 2


@pytest.mark.parametrize("name", ["trees.jsonl", "table.safetensors"])
@pytest.mark.parametrize("fault", ["torn", "altered", "gone", "empty"])
def test_a_torn_or_altered_store_is_made_again(tmp_path, tokenizer, tokenised, name, fault):
    built = list(token_trees(ROWS, tokenizer, RESPONSES, tmp_path))
    path = store_of(tmp_path) / name
    data = path.read_bytes()
    flipped = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    path.write_bytes({"torn": data[:-1], "altered": flipped, "gone": b"", "empty": b""}[fault])
    if fault == "gone":
        path.unlink()
    assert list(token_trees(ROWS, tokenizer, RESPONSES, tmp_path)) == built and tokenised == [2, 2]
    assert path.read_bytes() == data


def test_no_rows_are_no_trees(tmp_path, tokenizer):
    for _ in range(2):
        assert list(token_trees([], tokenizer, RESPONSES, tmp_path)) == []


def test_many_rows_are_built_by_many_processes_as_by_one(tmp_path, tokenizer, tokenised, monkeypatch):
    rows = many(2 * dpo.tokens.CHUNK_ROWS + 7)
    alone = token_trees(rows, tokenizer, RESPONSES, tmp_path / "alone")
    assert sum(tokenised) == len(rows)
    assert list(alone) == plain(rows, tokenizer, RESPONSES) and alone.column("row") == list(range(len(rows)))
    monkeypatch.setattr(dpo.tokens, "PARALLEL_ROWS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    together = token_trees(rows, tokenizer, RESPONSES, tmp_path / "together")
    assert sum(tokenised) == len(rows)  # elsewhere
    assert together.digest == alone.digest and np.array_equal(together.table, alone.table)
    settings = dataclasses.replace(RESPONSES, pack_tokens=150)
    with pytest.raises(UserError, match="row '00001' needs"):
        token_trees(rows, tokenizer, settings, tmp_path / "together")
    assert [path.suffix for path in (tmp_path / "together" / "tokens").iterdir()].count("") == 1  # nothing half made


def test_two_processes_that_need_the_same_trees_make_them_once(tmp_path, tokenizer):
    fork = multiprocessing.get_context("fork")
    calls = fork.Value("i", 0)

    def slow(rows, *rest):
        with calls.get_lock():
            calls.value += 1
        multiprocessing.Event().wait(0.3)
        return build_trees(rows, *rest)

    def one() -> None:
        dpo.tokens.build_trees = slow
        assert len(token_trees(ROWS, tokenizer, RESPONSES, tmp_path)) == 2

    processes = [fork.Process(target=one) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and calls.value == 1


# --- rows that are too long -----------------------------------------------------------------------------------------

LONG = Row("long", "s", DIALOGUE, ("Yes.",), ("No, never.",), "g")
SHORT = ROWS[0]


def longest(tree: Tree) -> int:
    return len(tree.prompt) + max(map(len, tree.branches))


def test_a_character_of_several_tokens_goes_whole(tokenizer):
    row = dataclasses.replace(LONG, prompt=({"role": "user", "content": "🙂abc"},))
    (whole,) = plain([row], tokenizer, RESPONSES)
    settings = dataclasses.replace(RESPONSES, max_tokens=longest(whole) - 1, too_long="cut_prompt")
    (built,) = build_trees([row], tokenizer, settings)
    assert list(built.tree.prompt) == tokenizer.prompt_ids([{"role": "user", "content": "abc"}])


@pytest.mark.parametrize("settings", [RESPONSES, VERDICTS], ids=["responses", "verdicts"])
def test_a_cut_prompt_fits_keeps_the_chat_around_it_and_all_of_the_answers(tokenizer, settings):
    (whole,) = plain([LONG], tokenizer, settings)
    for limit in range(longest(whole) - 1, 0, -7):
        cut = dataclasses.replace(settings, max_tokens=limit, too_long="cut_prompt")
        built = list(build_trees([LONG], tokenizer, cut))
        if not built:
            break
        tree = built[0].tree
        assert built[0].cut and longest(tree) <= limit
        text, kept = tokenizer.decode(tree.prompt), tokenizer.decode([*tree.prompt, *tree.branches[0]])
        assert text.startswith("<|im_start|>system\n") and kept.count("<|im_start|>system\n") == 1
        assert "\ufffd" not in text  # no character is cut in two
        if settings.objective == "responses":
            assert text.startswith("<|im_start|>system\nBe brief — please.<|im_end|>\n<|im_start|>user\n")
            assert text.endswith("word <|im_end|>\n<|im_start|>assistant\n") or text.endswith("assistant\n")
            assert [c.targets for c in tree.completions] == [c.targets for c in whole.completions]
            assert tree.pairs == whole.pairs
        else:
            assert "Answer A: Yes.\n\nAnswer B: No, never." in kept and kept.endswith("<|im_start|>assistant\n")
    assert limit < longest(whole) - 100  # the request itself was cut, not only the oldest exchange


def test_the_oldest_exchange_goes_before_a_word_of_the_last_message(tokenizer):
    (whole,) = plain([LONG], tokenizer, RESPONSES)
    settings = dataclasses.replace(RESPONSES, max_tokens=longest(whole) - 1, too_long="cut_prompt")
    (built,) = build_trees([LONG], tokenizer, settings)
    assert list(built.tree.prompt) == tokenizer.prompt_ids([DIALOGUE[0], DIALOGUE[3]])


def test_of_one_message_just_the_tokens_too_many_are_cut_from_the_left(tokenizer):
    row = dataclasses.replace(LONG, prompt=({"role": "user", "content": "0123456789"},))
    (whole,) = plain([row], tokenizer, RESPONSES)
    settings = dataclasses.replace(RESPONSES, max_tokens=longest(whole) - 4, too_long="cut_prompt")
    (built,) = build_trees([row], tokenizer, settings)  # a token is a byte here
    assert longest(built.tree) == settings.max_tokens
    assert list(built.tree.prompt) == tokenizer.prompt_ids([{"role": "user", "content": "456789"}])


def test_what_cannot_be_cut_to_fit_is_dropped_and_the_rows_around_it_keep_their_place(tmp_path, tokenizer):
    wide = dataclasses.replace(SHORT, id="wide", chosen=("x" * 500,))
    rows = [wide, SHORT, dataclasses.replace(LONG, id="cut")]
    settings = dataclasses.replace(RESPONSES, max_tokens=150)
    for too_long, places in (("cut_prompt", [1, 2]), ("drop", [1])):
        trees = token_trees(rows, tokenizer, dataclasses.replace(settings, too_long=too_long), tmp_path)
        assert trees.column("row") == places and trees.column("cut") == [0, 1][: len(places)]
        assert [tree.id for tree in trees] == [rows[i].id for i in places]
    with pytest.raises(UserError, match=r"'wide' needs .* more than data.max_tokens = 150; raise data.max_tokens"):
        token_trees(rows, tokenizer, settings, tmp_path)


def test_a_limit_that_cuts_nothing_leaves_every_address_of_the_reference_store_as_it_was(tmp_path, tokenizer):
    one = token_trees(ROWS, tokenizer, RESPONSES, tmp_path)
    limited = dataclasses.replace(RESPONSES, max_tokens=2000, too_long="cut_prompt")
    other = token_trees(ROWS, tokenizer, limited, tmp_path)
    assert [tree.key(c) for tree in one for c in range(2)] == [tree.key(c) for tree in other for c in range(2)]
    assert one.digest == other.digest  # nor is a run that goes on refused


def test_dropped_and_cut_rows_of_every_split_are_counted_and_leave_rows_and_trees_in_step(tmp_path):
    rows = []
    for split in ("train", "validation", "test"):
        for i, size in enumerate((10, 1200, 10, 10)):
            prompt = ({"role": "user", "content": f"{split} {i} " + "x" * size},)
            answers = (("y" * (1500 if i == 2 else 5) + f"{split}{i}",), (f"z{split}{i}",))
            rows.append(Row(f"{split}{i}", "s", prompt, *answers, f"{split}{i}", split))
    write_rows(tmp_path / "rows.jsonl", rows)

    def read(*settings: str):
        places = [f"data.path={tmp_path / 'rows.jsonl'}", f"run.cache={tmp_path / 'cache'}", "model.path=tiny-random"]
        return read_inputs(load_config(["exp=smoke", *places, "pack.tokens=1024", *settings]), "cpu")

    with pytest.raises(UserError, match=r"rows.jsonl:2: row 'train1' needs .* pack.tokens = 1024"):
        read()
    each = ("train", "validation", "test")
    for objective in ("responses", "verdicts"):
        for too_long, dropped, truncated in (("drop", 2, 0), ("cut_prompt", 1, 1)):
            inputs = read(f"objective={objective}", f"data.too_long={too_long}")
            data = inputs.splits.report
            assert data["too_long"] == dict.fromkeys(each, dropped)
            assert data["truncated"] == dict.fromkeys(each, truncated)
            assert [row.id for row in inputs.splits.train] == [tree.id for tree in inputs.train_trees]
            assert [row.id for row in inputs.splits.validation] == [tree.id for tree in inputs.validation_trees]
            assert len(inputs.splits.train) == len(inputs.splits.test) == 4 - dropped
    with pytest.raises(UserError, match=r"all 4 train rows are longer than 64 tokens; raise data.max_tokens"):
        read("objective=responses", "data.too_long=drop", "data.max_tokens=64")
    with pytest.raises(UserError, match="data.max_tokens=2048: more than pack.tokens = 1024"):
        read("data.max_tokens=2048")


def test_rows_whose_answer_joins_the_prompt_are_counted(tmp_path, tokenizer, monkeypatch):
    assert token_trees(ROWS, tokenizer, RESPONSES, tmp_path / "a").column("merges") == [0, 0]
    monkeypatch.setattr(Tokenizer, "boundary_differs", lambda self, prompt, answer, thinking: answer == "May")
    assert token_trees(ROWS, tokenizer, RESPONSES, tmp_path / "b").column("merges") == [1, 0]
    assert token_trees(ROWS, tokenizer, VERDICTS, tmp_path / "b").column("merges") == [0, 0]  # "A" follows no answer
