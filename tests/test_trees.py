"""dpo/trees.py on real tokenizers: what is scored, worked out again from a plain rendering of the messages."""

import dataclasses
import functools
import itertools
import random

import pytest

import dpo.trees
from dpo.packing import pack_trees
from dpo.rows import Row, pairs_of, read_rows, write_rows
from dpo.trees import (
    LEAST_SAVED,
    Completion,
    Pair,
    Stem,
    Tree,
    TreeSettings,
    find_stems,
    one_order,
    response_tree,
    verdict_tree,
)
from models.attention import runs
from models.errors import UserError
from models.tokenizer import Tokenizer, load_tokenizer

USER = ({"role": "user", "content": "Name the second month."},)
DIALOGUE = (
    {"role": "system", "content": "Be brief — please."},
    {"role": "user", "content": "Hi, ¿qué tal?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Translate: 日本語 🙂"},
)
ROW = Row("r1", "Focus", USER, ("February.", "It is February."), ("March.", "Февраль?", "I don't know"), "g")
PAIRS = TreeSettings("verdicts", 0, "pair", 2048)  # all of a row's
FIRST = dataclasses.replace(PAIRS, pairs_per_row=1)
ROWS = [ROW, dataclasses.replace(ROW, id="r2", prompt=DIALOGUE, chosen=("Japanese 🙂",), rejected=("日本",))]


@pytest.fixture(params=["tiny_folder", "smollm2_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokenizer(folder) -> Tokenizer:
    return our_tokenizer(folder)


def build_trees(rows, tokenizer, **settings) -> list[Tree]:
    return [built.tree for built in dpo.trees.build_trees(rows, tokenizer, TreeSettings(**settings))]


our_tokenizer = functools.cache(load_tokenizer)


@functools.cache
def transformers_tokenizer(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def plain(folder, messages, generate: bool = True) -> tuple[int, ...]:
    """The chat's tokens by transformers, which shares no code with the trees."""
    theirs = transformers_tokenizer(folder)
    text = theirs.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    return tuple(theirs.encode(text, add_special_tokens=False))


def scored_sequence(tree: Tree, completion: Completion) -> tuple[int, ...]:
    """Prompt, branch and targets as the one sequence that a plain forward would score the end of."""
    return (*tree.prompt, *tree.branches[completion.branch][: completion.start], *completion.targets)


# --- responses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=["one turn", "dialogue"])
def test_a_responses_scored_tokens_are_the_answer_and_its_end_of_turn(folder, tokenizer, row):
    tree = response_tree(row, tokenizer, PAIRS)
    assert tree.prompt == plain(folder, row.prompt)
    end = tokenizer.encode("<|im_end|>")
    for answer, completion in zip([*row.chosen, *row.rejected], _by_answer(tree, row), strict=True):
        whole = plain(folder, [*row.prompt, {"role": "assistant", "content": answer}], generate=False)
        newline = tokenizer.encode("\n")  # what ChatML writes after the turn's end is nobody's to predict
        assert scored_sequence(tree, completion) + tuple(newline) == whole
        assert completion.start == 0 and tokenizer.decode(completion.targets) == f"{answer}<|im_end|>"
        assert list(completion.targets[-1:]) == end
        assert tree.branches[completion.branch] == completion.targets[:-1]  # the last token is never an input


def _by_answer(tree: Tree, row: Row) -> list[Completion]:
    """Each answer's completion, found through the pairs that name it."""
    winners = {i: pair.winner for (i, _), pair in zip(pairs_of(row, 0), tree.pairs, strict=True)}
    losers = {j: pair.loser for (_, j), pair in zip(pairs_of(row, 0), tree.pairs, strict=True)}
    numbers = [*(winners[i] for i in sorted(winners)), *(losers[j] for j in sorted(losers))]
    return [tree.completions[number] for number in numbers]


def test_an_answer_that_begins_or_ends_in_white_space_is_scored_as_generation_would_write_it(tokenizer):
    row = dataclasses.replace(ROW, chosen=("\n\nFebruary. \n",), rejected=(" February",))
    tree = response_tree(row, tokenizer, FIRST)
    assert [tokenizer.decode(completion.targets) for completion in tree.completions] == [
        "\n\nFebruary. \n<|im_end|>",
        " February<|im_end|>",
    ]
    assert list(tree.prompt) == tokenizer.prompt_ids(USER)


def test_each_answer_is_run_once_however_many_pairs_it_is_in(tokenizer):
    tree = response_tree(ROW, tokenizer, PAIRS)
    assert len(tree.branches) == len(tree.completions) == 5 and len(tree.pairs) == 6
    assert len({(pair.winner, pair.loser) for pair in tree.pairs}) == 6
    repeated = dataclasses.replace(ROW, chosen=("February.", "February."), rejected=("March.", "March."))
    tree = response_tree(repeated, tokenizer, PAIRS)
    assert len(tree.branches) == len(tree.completions) == 2
    assert {(pair.winner, pair.loser) for pair in tree.pairs} == {(0, 1)} and len(tree.pairs) == 4


def test_only_the_answers_of_the_pairs_asked_for_are_run(tokenizer):
    tree = response_tree(ROW, tokenizer, dataclasses.replace(PAIRS, pairs_per_row=2))
    assert [tokenizer.decode(c.targets) for c in tree.completions] == [
        f"{answer}<|im_end|>" for answer in ("February.", "March.", "Февраль?")
    ]
    assert tree.pairs == (Pair(0, 1, 1.0), Pair(0, 2, 1.0))


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sighted", [True, False], ids=["sighted", "blind"])
@pytest.mark.parametrize("row", ROWS, ids=["one turn", "dialogue"])
def test_prompt_and_branch_are_the_judges_whole_prompt_in_each_order(folder, tokenizer, row, sighted):
    tree = verdict_tree(row, tokenizer, dataclasses.replace(PAIRS, sighted=sighted))
    assert len(tree.branches) == 2 * len(pairs_of(row, 0))
    orders = [order for i, j in pairs_of(row, 0) for order in _orders(row.chosen[i], row.rejected[j])]
    for branch, (first, second) in zip(tree.branches, orders, strict=True):
        text = tokenizer.decode([*tree.prompt, *branch])
        assert tuple(tokenizer.encode(text)) == (*tree.prompt, *branch)
        system, user = _turns(text)
        assert user.endswith(f"Answer A: {first}\n\nAnswer B: {second}\n\nBetter answer:")
        seen = [message["content"] in user for message in row.prompt]
        assert all(seen) if sighted else not any(seen)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        assert plain(folder, messages) == (*tree.prompt, *branch)


def _orders(chosen: str, rejected: str) -> list[tuple[str, str]]:
    return [(chosen, rejected), (rejected, chosen)]


def _turns(text: str) -> tuple[str, str]:
    """The system's and the user's text of a ChatML prompt that holds nothing else."""
    head, system, user, assistant = text.split("<|im_start|>")
    assert head == "" and assistant == "assistant\n"
    return (
        system.removeprefix("system\n").removesuffix("<|im_end|>\n"),
        user.removeprefix("user\n").removesuffix("<|im_end|>\n"),
    )


@pytest.mark.parametrize("row", ROWS, ids=["one turn", "dialogue"])
def test_the_winner_is_the_letter_that_stands_before_the_chosen_answer_in_both_orders(tokenizer, row):
    tree = verdict_tree(row, tokenizer, PAIRS)
    for b, pair in enumerate(tree.pairs):
        winner, loser = tree.completions[pair.winner], tree.completions[pair.loser]
        assert winner.branch == loser.branch == b
        user = _turns(tokenizer.decode([*tree.prompt, *tree.branches[b]]))[1]
        answers = {letter: user.split(f"Answer {letter}: ")[-1].split("\n\n")[0] for letter in "AB"}
        assert answers[tokenizer.decode(winner.targets)] in row.chosen
        assert answers[tokenizer.decode(loser.targets)] in row.rejected
        for completion in (winner, loser):  # one token, predicted at the branch's last row: nothing runs for it
            assert completion.start == len(tree.branches[b]) > 0 and len(completion.targets) == 1
    winners = [tokenizer.decode(tree.completions[pair.winner].targets) for pair in tree.pairs]
    assert winners == ["A", "B"] * len(pairs_of(row, 0))


@pytest.mark.parametrize("pairs_per_row", [0, 1])
def test_the_shared_prefix_of_the_orders_is_as_long_as_it_can_be(tokenizer, pairs_per_row):
    tree = verdict_tree(ROW, tokenizer, dataclasses.replace(PAIRS, pairs_per_row=pairs_per_row))
    assert len({branch[0] for branch in tree.branches}) > 1  # one more token would not be shared
    assert ROW.prompt[0]["content"] in tokenizer.decode(tree.prompt)


def test_a_branch_never_becomes_empty_even_where_one_order_begins_as_another_ends(tokenizer):
    """Answers of which one begins with the other share more than the request."""
    row = dataclasses.replace(ROW, chosen=("no",), rejected=("no no",))
    tree = verdict_tree(row, tokenizer, FIRST)
    assert all(tree.branches) and tree.branches[0][0] != tree.branches[1][0]


# --- what branches begin with ----------------------------------------------------------------------------------------


def shared_by(branches, stems) -> dict[int, tuple[set[tuple[int, ...]], int, int]]:
    """By a stem's number: the ways that lead through it, how many branches have it, how many tokens it has."""
    found: dict[int, tuple[set[tuple[int, ...]], int, int]] = {}
    for branch, of_branch in zip(branches, stems, strict=True):
        ends = [0, *(stem.end for stem in of_branch)]
        for begin, stem in zip(ends, of_branch, strict=False):
            ways, count, _ = found.get(stem.number, (set(), 0, 0))
            found[stem.number] = ways | {branch[: stem.end]}, count + 1, stem.end - begin
    return found


@pytest.mark.parametrize("least", [1, 3, 8])
def test_stems_are_what_branches_begin_with_each_saves_enough_and_of_one_token_all_are_found(least):
    draw = random.Random(0)
    for _ in range(100):
        branches = tuple(
            tuple(draw.randrange(2) for _ in range(draw.randint(0, 12))) for _ in range(draw.randint(1, 6))
        )
        stems = find_stems(branches, least=least) or ((),) * len(branches)
        shared = shared_by(branches, stems)
        assert all(len(ways) == 1 for ways, _, _ in shared.values())
        assert all((count - 1) * tokens >= least for _, count, tokens in shared.values())
        tree = Tree("t", (1,), branches, (), (), stems=stems)
        if least == 1:  # then every beginning is run once
            every = {branch[:end] for branch in branches for end in range(1, len(branch) + 1)}
            assert tree.tokens_of(range(len(branches))) == len(every)
        saved = sum((count - 1) * tokens for _, count, tokens in shared.values())
        assert tree.tokens_of(range(len(branches))) == sum(map(len, branches)) - saved


def test_branches_of_which_each_begins_with_the_one_before_are_found_whatever_their_number():
    branches = [(7,) * n for n in range(1, 1200)]
    assert len(find_stems(branches)) == len(branches)


LONG = dataclasses.replace(
    ROW,
    chosen=("The second month of the year is February. " * 9,),
    rejected=("March. " * 30, "May? " * 40, "No. " * 35),
)


def test_an_answer_that_stands_first_in_several_questions_is_run_once_for_them(tokenizer):
    tree = verdict_tree(LONG, tokenizer, PAIRS)
    assert len(tree.branches) == 6 and len({stems[:1] for stems in tree.stems}) == 2
    assert [bool(stems) for stems in tree.stems] == [True, False] * 3  # the right answer first; each other one once
    (stem,) = tree.stems[0]
    assert LONG.chosen[0].strip() in tokenizer.decode(tree.branches[0][: stem.end])
    assert tree.tokens == len(tree.prompt) + sum(map(len, tree.branches)) - 2 * stem.end
    (batch,) = pack_trees([tree], 8192)
    (pack,) = batch.packs
    assert pack.layout.tokens == tree.tokens
    written = {tokenizer.decode(sequence) for sequence in _scored_in(pack)}
    assert written == {tokenizer.decode(scored_sequence(tree, completion)) for completion in tree.completions}


def _scored_in(pack) -> list[list[int]]:
    """What each scored token of a pack is behind, by what its layout says is seen, and the token itself."""
    found = []
    for row, target in zip(pack.rows_R.tolist(), pack.targets_R.tolist(), strict=True):
        (run,) = (run for run in runs(pack.layout) if run.seen[-1].start <= row < run.seen[-1].stop)
        *before, own = run.seen
        places = [place for part in before for place in range(part.start, part.stop)] + [*range(own.start, row + 1)]
        assert pack.positions_T[places].tolist() == list(range(len(places)))
        found.append([*pack.tokens_T[places].tolist(), target])
    return found


def test_a_tree_that_is_cut_between_packs_runs_a_stem_in_each_of_those_that_need_it(tokenizer):
    tree = verdict_tree(LONG, tokenizer, PAIRS)
    room = len(tree.prompt) + max(map(len, tree.branches)) + 8
    (batch,) = pack_trees([tree], room)
    assert len(batch.packs) > 2 and all(pack.layout.tokens <= room for pack in batch.packs)
    scored = [sequence for pack in batch.packs for sequence in _scored_in(pack)]
    assert sorted(scored) == sorted(list(scored_sequence(tree, completion)) for completion in tree.completions)


def test_one_order_keeps_the_addresses_of_both_orders(tokenizer):
    tree = verdict_tree(LONG, tokenizer, PAIRS)
    one = one_order(tree, 0)
    every = {tree.key(c) for c in range(len(tree.completions))}
    assert len(one.branches) == 3 and {one.key(c) for c in range(len(one.completions))} < every


def test_answers_that_begin_alike_share_it_and_short_beginnings_are_left(tokenizer):
    alike = "The second month of the year is " * 6
    row = dataclasses.replace(ROW, chosen=(alike + "February.",), rejected=(alike + "March.", "It is May."))
    tree = response_tree(row, tokenizer, PAIRS)
    assert [len(stems) for stems in tree.stems] == [1, 1, 0] and tree.stems[0] == tree.stems[1]
    assert tree.stems[0][0].end >= LEAST_SAVED
    assert response_tree(ROW, tokenizer, PAIRS).stems == ()


# --- weights, addresses, lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "pairs"), [(response_tree, 6), (verdict_tree, 12)])
def test_a_pair_weighs_one_or_all_pairs_of_a_row_together_do(tokenizer, build, pairs):
    for name, weight in (("pair", 1.0), ("row", 1 / pairs)):
        settings = dataclasses.replace(PAIRS, pair_weight=name)
        assert [pair.weight for pair in build(ROW, tokenizer, settings).pairs] == [weight] * pairs


BASE = Tree("t", (5, 6, 7), ((8, 9), (8,)), (Completion(0, 1, (9, 2)), Completion(1, 0, (8, 2))), (Pair(0, 1, 1.0),))
CHANGED = {
    "a stem": dataclasses.replace(BASE, stems=((Stem(0, 1),), (Stem(0, 1),))),
    "end of the stem": dataclasses.replace(BASE, stems=((Stem(0, 2),), ())),
    "a stem more": dataclasses.replace(BASE, stems=((Stem(0, 1), Stem(1, 2)), ())),
    "end of the prefix": dataclasses.replace(BASE, prefix=2),
    "prompt token": dataclasses.replace(BASE, prompt=(5, 6, 1)),
    "prompt longer by a token of the branch": dataclasses.replace(BASE, prompt=(5, 6, 7, 8), branches=((9,), (8,))),
    "prompt order": dataclasses.replace(BASE, prompt=(6, 5, 7)),
    "branch token": dataclasses.replace(BASE, branches=((8, 1), (8,))),
    "other branch": dataclasses.replace(BASE, completions=(Completion(1, 1, (9, 2)), BASE.completions[1])),
    "start of the span": dataclasses.replace(BASE, completions=(Completion(0, 2, (9, 2)), BASE.completions[1])),
    "scored token": dataclasses.replace(BASE, completions=(Completion(0, 1, (9, 3)), BASE.completions[1])),
    "end of the span": dataclasses.replace(BASE, completions=(Completion(0, 1, (9,)), BASE.completions[1])),
}


@pytest.mark.parametrize("part", CHANGED)
def test_the_address_of_a_log_prob_changes_with_each_part_of_what_is_scored(part):
    assert CHANGED[part].key(0) != BASE.key(0)


def test_the_addresses_of_all_changes_differ_and_are_sixteen_bytes():
    keys = [tree.key(0) for tree in (BASE, *CHANGED.values())] + [BASE.key(1)]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {16}


def test_the_address_does_not_depend_on_names_pairs_weights_or_other_completions():
    other = Tree("other", BASE.prompt, ((1,), BASE.branches[0]), (Completion(1, 1, (9, 2)),), (Pair(0, 0, 0.5),))
    assert other.key(0) == BASE.key(0)


@pytest.mark.parametrize("objective", ["responses", "verdicts"])
def test_a_row_that_does_not_fit_the_pack_is_named_by_file_and_line(tmp_path, folder, tokenizer, objective):
    long = dataclasses.replace(ROWS[1], prompt=USER, rejected=("word " * 60,))
    write_rows(tmp_path / "rows.jsonl", [ROW, long])
    rows = read_rows(tmp_path / "rows.jsonl")

    def build(pack_tokens: int) -> list[Tree]:
        return build_trees(
            rows, tokenizer, objective=objective, pairs_per_row=0, pair_weight="pair", pack_tokens=pack_tokens
        )

    needed = max(len(tree.prompt) + len(branch) for tree in build(10**6) for branch in tree.branches)
    assert [tree.id for tree in build(needed)] == ["r1", "r2"]
    with pytest.raises(UserError) as error:
        build(needed - 1)
    message = str(error.value)
    assert message.startswith("rows.jsonl:2: ") and "'r2'" in message and f"pack.tokens = {needed - 1}" in message
    shorter = sum(map(int, itertools.islice((word for word in message.split() if word.isdigit()), 2)))
    assert shorter == needed  # prompt + branch tokens, as the message counts them


def test_trees_stand_in_the_order_of_their_rows(tokenizer):
    for objective in ("responses", "verdicts"):
        built = build_trees(
            ROWS[::-1], tokenizer, objective=objective, pairs_per_row=1, pair_weight="row", pack_tokens=2048
        )
        assert [tree.id for tree in built] == ["r2", "r1"]


# --- the prefix that judges' prompts share --------------------------------------------------------------------------


@pytest.mark.parametrize("sighted", [True, False], ids=["sighted", "blind"])
def test_every_judges_prompt_begins_with_the_same_prefix_up_to_the_first_word_of_its_row(tokenizer, sighted):
    arguments = {"objective": "verdicts", "pairs_per_row": 1, "pair_weight": "pair", "pack_tokens": 2048}
    trees = build_trees(ROWS, tokenizer, sighted=sighted, **arguments)
    prefixes = {tree.prompt[: tree.prefix] for tree in trees}
    assert len(prefixes) == 1
    (prefix,) = prefixes
    text = tokenizer.decode(prefix)
    system, _, user = text.partition("<|im_end|>")
    opening = user.partition("user\n")[2]
    assert "You compare two answers" in system and ("Request: " if sighted else "Answer A: ").startswith(opening)
    assert len(tokenizer.encode("Request: " if sighted else "Answer A: ")) - len(tokenizer.encode(opening)) <= 2


def test_a_pack_runs_the_prefix_of_its_trees_once_and_keeps_other_prefixes_apart(tokenizer):
    arguments = {"objective": "verdicts", "pairs_per_row": 1, "pair_weight": "pair", "pack_tokens": 2048}
    sighted, blind = (build_trees(ROWS, tokenizer, sighted=sighted, **arguments) for sighted in (True, False))
    (batch,) = pack_trees(sighted, 2048)
    (pack,) = batch.packs
    assert pack.layout.prefix == sighted[0].prefix > 0
    assert pack.layout.tokens == sum(tree.tokens for tree in sighted) - sighted[0].prefix
    mixed = [pack for batch in pack_trees([*sighted, *blind], 2048) for pack in batch.packs]
    assert sorted(pack.layout.prefix for pack in mixed) == sorted([sighted[0].prefix, blind[0].prefix])


def test_a_prefix_that_a_prompt_does_not_begin_with_is_not_shared(tokenizer):
    tree = verdict_tree(ROW, tokenizer, FIRST, prefix=(1, 2, 3))
    assert tree.prefix == 0
    whole = verdict_tree(ROW, tokenizer, FIRST, prefix=tree.prompt)  # a prompt keeps a token of its own
    assert whole.prefix == 0 and whole.prompt == tree.prompt


def test_one_order_keeps_of_each_pair_one_question_with_its_verdicts_and_draws_it_by_the_seed(
    tokenizer: Tokenizer,
) -> None:
    how = {"objective": "verdicts", "pairs_per_row": 0, "pair_weight": "pair", "pack_tokens": 4096}
    rows = [dataclasses.replace(ROW, id=f"r{n}") for n in range(20)]
    both, one, other = (
        build_trees(rows, tokenizer, **how, one_order=single, seed=seed)
        for single, seed in ((False, 0), (True, 0), (True, 1))
    )
    firsts = 0
    for whole, tree in zip(both, one, strict=True):
        assert tree.prompt == whole.prompt and len(tree.branches) == len(tree.pairs) == 6
        for place, (branch, pair) in enumerate(zip(tree.branches, tree.pairs, strict=True)):
            order = whole.branches[2 * place : 2 * place + 2].index(branch)
            same = whole.pairs[2 * place + order]
            ends = [(pair.winner, same.winner), (pair.loser, same.loser)]
            assert all(
                scored_sequence(tree, tree.completions[a]) == scored_sequence(whole, whole.completions[b])
                for a, b in ends
            )
            assert pair.twin is None and pair.weight == same.weight
            firsts += order == 0
    assert 40 <= firsts <= 80 and one != other  # of 120
