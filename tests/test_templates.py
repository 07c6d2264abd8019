"""The families' chat templates: same text and tokens as transformers, and what of an answer is scored.

Those in tests/templates are ours, with every construct of the published ones: tools, calls, channels, think blocks.
"""

import functools
import importlib
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dpo.card import served
from dpo.config import Config
from dpo.judge.endpoint import request_of
from dpo.rows import Row
from dpo.settings import load_config
from dpo.trees import TreeSettings, response_tree, verdict_tree
from models.errors import UserError
from models.tokenizer import FROZEN_DATE, Tokenizer, byte_level_bpe, load_tokenizer, read_variables, write_tokenizer
from tests.test_tokenizer import CHATS, USER, StoppedClock

FIRST = TreeSettings("verdicts", 1, "pair", 2048)  # the first pair of a row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(__file__).parent / "templates"
MERGES = ("Ċ Ċ", "Ġ a", "Ġ A", "Ġ B", "h e", "Ġ t", "Ġt he", "i n", "> Ċ", "l e")  # "Ċ": a newline, "Ġ": a space
SYSTEM = CHATS["system turn"]
NO_THINKING = read_variables(Config(exp="x").model.template_variables)


def sentencepiece(special: list[str]) -> tokenizers.Tokenizer:
    """As Mistral's: a space is put before each piece of text between special tokens; unknown characters are bytes."""
    letters = ["▁", *map(chr, range(33, 127)), "▁▁", "in", "▁A", "▁B"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("▁", "▁"), ("i", "n"), ("▁", "A"), ("▁", "B")],
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return byte_level_bpe([*special, *alphabet, *(m.replace(" ", "") for m in MERGES)], MERGES, special)


@dataclass(frozen=True)
class Family:
    """A family's special tokens, the first of which begin and end a text, and what of an answer is scored."""

    special: str
    scored: Callable[[str], str]
    bos: bool = True  # the tokenizer would begin each text with its BOS
    backend: Callable[[list[str]], tokenizers.Tokenizer] = byte_level


CHATML = "<|endoftext|> <|im_end|> <|im_start|> <think> </think>"
LLAMA3 = "<|begin_of_text|> <|eot_id|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>"
HARMONY = "<|startoftext|> <|return|> <|endoftext|> <|start|> <|end|> <|message|> <|channel|> <|call|>"
FAMILIES = {
    "chatml": Family(CHATML, lambda answer: f"{answer}<|im_end|>", bos=False),
    "llama3": Family(LLAMA3, lambda answer: f"{answer.strip()}<|eot_id|>"),
    "llama31": Family(LLAMA3, lambda answer: f"{answer.strip()}<|eot_id|>"),
    "llama32": Family(LLAMA3, lambda answer: f"{answer.strip()}<|eot_id|>"),
    "qwen2_5": Family(CHATML, lambda answer: f"{answer}<|im_end|>", bos=False),
    "qwen3": Family(CHATML, lambda answer: answer.lstrip("\n") + "<|im_end|>", bos=False),
    "qwen3_2507": Family(CHATML, lambda answer: f"{answer}<|im_end|>", bos=False),
    "mistral": Family("<s> </s> [INST] [/INST]", lambda answer: f" {answer.strip()}</s>", backend=sentencepiece),
    "harmony": Family(HARMONY, lambda answer: f"<|channel|>final<|message|>{answer}<|return|>", bos=False),
    "llama4": Family("<|begin_of_text|> <|eot|> <|header_start|> <|header_end|>", lambda answer: f"{answer}<|eot|>"),
}
PARAMETERS = {
    "x": {"type": "string", "description": "an <x>", "enum": ["é", "b"], "default": "b"},
    "y": {"type": "array", "items": {"type": "object", "properties": {"z": {"type": "integer"}}}, "description": "ys"},
    "z": {"oneOf": [{"type": "number", "default": 1}, {"type": ["boolean", "null"]}], "description": "either"},
    "n": {"type": "array", "items": {"type": "string"}, "nullable": True, "description": "names"},
}
LEGS = {"name": "legs", "description": "Counts."}
TOOLS = [
    {"type": "function", "function": LEGS | {"parameters": {"properties": PARAMETERS, "required": ["x"]}}},
    {"type": "function", "function": LEGS | {"name": "none"}},
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "legs", "arguments": {"x": "<é>"}}}]}
RESULT = {"role": "tool", "content": '{"legs": 8}'}
EIGHT = {"role": "assistant", "content": "Eight.", "thinking": "Two\nfours."}
CALLS: list[list[dict[str, object]]] = [
    [*SYSTEM, CALL, RESULT],
    [USER, CALL | {"thinking": "I ask."}, RESULT, RESULT, EIGHT],
    [*SYSTEM, CALL | {"content": "I ask."}, RESULT, EIGHT, USER],
    [USER, CALL | {"tool_calls": [CALL["tool_calls"][0]] * 2}, RESULT],  # type: ignore[index]
    [USER, RESULT],
]
CALLING = ("harmony", "llama31", "llama32", "llama4", "qwen2_5", "qwen3", "qwen3_2507")
ANSWERS = ("Eight.", "", " a\n", "\n\nb", "{{ 1 }}\r\n  in the end", "👩‍👩‍👧é")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, made as published ones are."""
    root = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        special = family.special.split()
        backend = family.backend(special)
        if family.bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], 0)]
            )
        (root / name).mkdir()
        write_tokenizer(root / name, backend, "unread", bos_id=0, eos_id=1, pad_id=0)
        shutil.copy(TEMPLATES / f"{name}.jinja", root / name / "chat_template.jinja")
    return root


@functools.cache
def ours_of(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, NO_THINKING)


@functools.cache
def theirs_of(folder: Path) -> "PreTrainedTokenizerBase":
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", StoppedClock)
    return str(request.param)


def chats_of(name: str) -> list[list[Mapping[str, str]]]:
    spelt = FAMILIES[name].special.replace(" ", "\n")
    assistant = {"role": "assistant", "content": "\nIt has <think>2 * 4</think>\n eight. "}
    longer = [*SYSTEM, assistant, {"role": "user", "content": "  Sure?\n"}]
    return [*CHATS.values(), longer, [{"role": "user", "content": f"{spelt} {spelt}"}]]


@pytest.mark.parametrize("prompt", [True, False])
def test_a_familys_chats_have_the_text_and_tokens_of_transformers(root: Path, name: str, prompt: bool) -> None:
    ours, theirs = ours_of(root / name), theirs_of(root / name)
    for chat in chats_of(name):
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **NO_THINKING)
        assert ours.render(chat, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, **NO_THINKING)["input_ids"]
        assert ours.encode(text) == ids
        assert not prompt or ours.prompt_ids(chat) == ids


def test_an_answer_is_scored_from_the_prompts_end_through_its_terminal_token(root: Path, name: str) -> None:
    ours, theirs, family = ours_of(root / name), theirs_of(root / name), FAMILIES[name]
    for chat in chats_of(name):
        prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **NO_THINKING)
        shown = name != "mistral" or chat[0]["role"] != "system"
        for answer in ANSWERS:
            ids = ours.completion_ids(chat, answer)
            assert ours.decode(ids) == family.scored(answer)
            assert ids[-1] == 1 and ids.count(1) == 1
            turn = {"role": "assistant", "content": answer}
            whole = theirs.apply_chat_template([*chat, turn], tokenize=False, **NO_THINKING)
            assert whole.rstrip("\n") == prompt + family.scored(answer) or not shown


def test_a_chat_begins_with_one_bos_though_template_and_tokenizer_would_both_write_it(root: Path, name: str) -> None:
    ours, theirs = ours_of(root / name), theirs_of(root / name)
    ids = ours.prompt_ids(SYSTEM)
    assert ids.count(0) == FAMILIES[name].bos
    if FAMILIES[name].bos:
        assert ids[0] == 0
        assert theirs(theirs.apply_chat_template(SYSTEM, tokenize=False))["input_ids"][:2] == [0, 0]  # the trap


def test_a_template_that_writes_bos_twice_is_refused(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root / "llama4", tmp_path / "copy"))
    template = copy / "chat_template.jinja"
    template.write_text("<|begin_of_text|>" + template.read_text())
    with pytest.raises(UserError, match=r"begins with <\|begin_of_text\|> twice: the chat template of .*copy"):
        load_tokenizer(copy).prompt_ids([USER])
    spelt = {"role": "user", "content": "<|begin_of_text|><|begin_of_text|>"}
    assert ours_of(root / "llama4").prompt_ids([spelt]).count(0) == 3  # a row's own text, inside its turn


def test_boundary_differs_where_the_whole_chat_encodes_otherwise(root: Path, name: str) -> None:
    ours, theirs = ours_of(root / name), theirs_of(root / name)
    for answer in ANSWERS:
        apart = ours.prompt_ids([USER]) + ours.completion_ids([USER], answer)
        chat = [USER, {"role": "assistant", "content": answer}]
        whole = theirs.apply_chat_template(chat, **NO_THINKING)["input_ids"]
        assert ours.boundary_differs([USER], answer) == (whole[: len(apart)] != apart)
    chatml = ours_of(root / "chatml")
    assert [chatml.boundary_differs([USER], answer) for answer in ("Eight.", "\n\nb")] == [False, True]


def test_qwen3s_empty_think_block_is_in_the_prompt_and_thinking_can_be_asked_for(root: Path) -> None:
    plain, thinks = ours_of(root / "qwen3"), load_tokenizer(root / "qwen3", read_variables(["enable_thinking=true"]))
    assert plain.render([USER]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert thinks.render([USER]).endswith("<|im_start|>assistant\n")
    answer = "<think>\ntwo fours\n</think>\n\nEight."
    with pytest.raises(UserError, match=r"doesn't continue its prompt.*model.template_variables"):
        plain.completion_ids([USER], answer)
    assert thinks.decode(thinks.completion_ids([USER], answer)) == f"{answer}<|im_end|>"
    assert plain.render([USER, {"role": "assistant", "content": answer}, USER]).count("<think>") == 1


def test_a_system_turn_that_mistral_shows_only_before_the_answer_stays_in_the_prompt(root: Path) -> None:
    ours = ours_of(root / "mistral")
    turn = {"role": "assistant", "content": "Eight."}
    assert "one word" not in ours.render([*SYSTEM, turn], add_generation_prompt=False)
    assert "Answer in one word.\n\nHow many" in ours.decode(ours.prompt_ids(SYSTEM))
    assert ours.completion_ids(SYSTEM, "Eight.") == ours.completion_ids([USER], "Eight.")
    with pytest.raises(UserError, match=r"mistral refuses messages with the roles \(user, user\).*must alternate"):
        ours.prompt_ids([USER, USER])


def test_harmony_ends_earlier_turns_otherwise_and_refuses_channels_in_an_answer(root: Path) -> None:
    ours = load_tokenizer(root / "harmony", read_variables(["reasoning_effort=low", "model_identity=You judge."]))
    text = ours.render([*CHATS["several turns"]])
    assert "<|channel|>final<|message|>Eight.<|end|><|start|>user" in text and text.endswith("<|start|>assistant")
    assert "Reasoning: low\n" in text and "You judge.\n" in text
    assert f"Current date: {FROZEN_DATE:%Y-%m-%d}" in text
    tagged = "<|channel|>analysis<|message|>hm<|end|>"
    for answer, thinking in ((tagged, ""), ("Eight.", tagged)):
        with pytest.raises(UserError, match=r"harmony refuses messages.*<\|channel\|> tags"):
            ours.completion_ids([USER], answer, thinking)


def text_or_refusal(render: Callable[..., str], **given: object) -> str:
    try:
        return render(**given)
    except jinja2.TemplateError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("told", [{}, {"builtin_tools": ["browser", "legs"], "tools_in_user_message": False}])
@pytest.mark.parametrize("name", CALLING, indirect=True)
def test_tools_and_their_calls_have_the_text_of_transformers(root: Path, name: str, told: Mapping[str, object]) -> None:
    ours, theirs = ours_of(root / name), theirs_of(root / name)
    apply = functools.partial(theirs.apply_chat_template, tokenize=False)
    render = functools.partial(ours.template.render, documents=None, **ours.special_tokens)
    for chat in [*CALLS, *chats_of(name)]:
        seen = [message | {"reasoning_content": message.get("thinking")} for message in chat]
        for tools in (TOOLS, None):
            given = {"tools": tools, "add_generation_prompt": chat[-1]["role"] != "assistant", **told}
            text = text_or_refusal(apply, conversation=chat, **given)
            assert text_or_refusal(render, messages=seen, **given) == text
            assert text.startswith("refused: ") or not tools or '"legs"' in text or "type legs = (_: {" in text


def test_thinking_is_scored_before_the_answer_and_gone_from_earlier_turns(root: Path, name: str) -> None:
    ours, theirs = load_tokenizer(root / name), theirs_of(root / name)
    blocks = {
        "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        "qwen3": ("<think>\n", "\n</think>\n\n"),
    }
    for chat in ([USER], [USER, EIGHT, USER], [*SYSTEM, EIGHT, USER, EIGHT, USER]):
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.prompt_ids(chat) == prompt
        if name not in blocks:
            with pytest.raises(UserError, match=f"{name} does not show an answer's thinking .'Two"):
                ours.completion_ids(chat, "Eight.", "Two\nfours.")
            continue
        ids = ours.completion_ids(chat, "Eight.", "Two\nfours.")
        assert ours.decode(ids) == "Two\nfours.".join(blocks[name]) + FAMILIES[name].scored("Eight.").removeprefix(
            "<|channel|>final<|message|>"
        )
        assert "Two" not in ours.decode(prompt)
        assert ours.decode([*prompt, *ids]) == theirs.apply_chat_template([*chat, EIGHT], tokenize=False).rstrip("\n")


def test_a_rows_thinking_is_trained_with_its_answer_and_not_shown_to_a_judge(root: Path) -> None:
    row = Row("r", "s", (USER,), ("Eight.",), ("Six.",), "g", thinking=(("Eight.", "Two fours."),))
    ours = ours_of(root / "harmony")
    chosen, rejected = (ours.decode(scored.targets) for scored in response_tree(row, ours, FIRST).completions)
    assert chosen == (
        "<|channel|>analysis<|message|>Two fours.<|end|><|start|>assistant<|channel|>final<|message|>Eight.<|return|>"
    )
    assert rejected == "<|channel|>final<|message|>Six.<|return|>"
    judged = verdict_tree(row, ours, FIRST)
    assert judged == verdict_tree(replace(row, thinking=()), ours, FIRST)


def test_generation_stops_at_the_end_of_a_turn_and_not_of_a_thought(root: Path, tmp_path: Path) -> None:
    ends = {"harmony": "<|return|> <|call|>", "llama4": "<|eot|>", "qwen3": "<|im_end|>", "llama31": "<|eot_id|>"}
    for name, tokens in ends.items():
        assert sorted(ours_of(root / name).end_ids) == sorted(ours_of(root / name).encode(tokens.replace(" ", "")))
    copy = Path(shutil.copytree(root / "qwen3", tmp_path / "copy"))
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert load_tokenizer(copy).end_ids == {0, 1}  # <|endoftext|>, as Qwen3 declares it


def test_a_verdict_stands_where_the_answers_text_begins(root: Path, name: str) -> None:
    ours = ours_of(root / name)
    opening = "<|channel|>final<|message|>" if name == "harmony" else ""
    for label in "AB":
        (verdict,) = ours.verdict_ids(label)
        answered = [*ours.verdict_prompt_ids([USER]), verdict, 1]
        assert answered == ours.prompt_ids([USER]) + ours.completion_ids([USER], label) or name == "mistral"
    assert ours.verdict_prompt_ids(SYSTEM) == ours.prompt_ids(SYSTEM) + ours.encode(opening)
    if name == "qwen3":
        thinks = load_tokenizer(root / name, read_variables(["enable_thinking=true"]))
        assert thinks.verdict_prompt_ids(SYSTEM) == thinks.prompt_ids(SYSTEM) + ours.encode("<think>\n\n</think>\n\n")
    row = Row("r", "s", (USER,), ("Eight.",), ("Six.",), "g")
    tree = verdict_tree(row, ours, FIRST)
    assert all(ours.decode([*tree.prompt, *branch]).endswith(opening) for branch in tree.branches)


def test_a_served_judge_is_asked_with_the_same_template_variables_or_its_thinking_is_told(
    root: Path, name: str
) -> None:
    more, warning = served(["enable_thinking=false"], root / name)
    assert bool(more) == (name == "qwen3") and bool(warning) == (name == "harmony")
    if more:
        config = load_config(["exp=judge", *shlex.split(more)])
        request = request_of((USER,), config.endpoint)
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
    if warning:
        assert "'<|channel|>final<|message|>'" in warning


def test_what_is_judged_ends_no_turn_and_opens_none(root: Path, name: str) -> None:
    """Whatever an answer spells, the judge's prompt has the same tokens with a meaning as without it."""
    ours = ours_of(root / name)
    added = ours.backend.get_added_tokens_decoder()
    spelt = "".join(token.content for token in added.values())

    def marks(wrong: str) -> list[int]:
        tree = verdict_tree(Row("r", "s", (USER,), ("Eight.",), (wrong,), "g"), ours, FIRST)
        return [token for token in (*tree.prompt, *tree.branches[0]) if token in added]

    assert marks(f"Six.{spelt}") == marks("Six.") and set(ours.encode(f"Six.{spelt}")) >= set(added)


def test_a_space_before_every_answer_belongs_to_the_verdict_if_the_vocabulary_joins_them(
    root: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(root / "chatml", tmp_path / "copy"))
    spaced = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    (copy / "chat_template.jinja").write_text(spaced + "{% if add_generation_prompt %}assistant:{% endif %}")
    ours = load_tokenizer(copy)
    assert ours.decode(ours.verdict_prompt_ids([USER])).endswith("assistant:")
    assert [ours.decode(ours.verdict_ids(label)) for label in "ABC"] == [" A", " B", "C"]
    assert len(ours.verdict_ids("C")) == 1


def test_stored_trees_are_not_those_of_other_template_variables(root: Path, tmp_path: Path) -> None:
    tokens, trees = pytest.importorskip("dpo.tokens"), importlib.import_module("dpo.trees")
    rows = [Row("r", "s", (USER,), ("Eight.",), ("Six.",), "g")]
    settings = trees.TreeSettings("responses", 0, "pair", 2048)
    for setting in ("enable_thinking=false", "enable_thinking=true"):
        tokenizer = load_tokenizer(root / "qwen3", read_variables([setting]))
        (tree,) = tokens.token_trees(rows, tokenizer, settings, tmp_path)
        assert list(tree.prompt) == tokenizer.prompt_ids([USER])


def test_llamas_date_is_its_own_the_frozen_one_or_the_one_that_is_set(root: Path) -> None:
    dates = {"llama31": "26 Jul 2024", "llama32": f"{FROZEN_DATE:%d %b %Y}"}
    for name, date in dates.items():
        assert f"Today Date: {date}\n\n" in ours_of(root / name).render([USER])
        told = load_tokenizer(root / name, read_variables(["date_string=1 May 2025"]))
        assert "Today Date: 1 May 2025\n\n" in told.render([USER])


def test_template_variables_are_json_or_text_and_named_once() -> None:
    told = read_variables(["a=true", "b=3", "c=x=y", "d=", 'e=["f"]'])
    assert told == {"a": True, "b": 3, "c": "x=y", "d": "", "e": ["f"]}
    for wrong in (["thinking"], ["=1"], ["a b=1"], ["messages=1"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match=f"model.template_variables = '{wrong[-1]}': must be NAME=VALUE"):
            read_variables(wrong)
