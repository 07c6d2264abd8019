"""The tokenizer against transformers: same text, same tokens; and what it refuses."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from models.errors import UserError
from models.tiny import CHATML, write_tiny_model
from models.tokenizer import FROZEN_DATE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER = {"role": "user", "content": "How many legs has a spider?"}
CHATS = {
    "one user turn": [USER],
    "system turn": [{"role": "system", "content": "Answer in one word."}, USER],
    "several turns": [USER, {"role": "assistant", "content": "Eight."}, {"role": "user", "content": "And two?"}],
    "unicode": [{"role": "user", "content": "Grüße, 你好, العربية, e\u0301 is é? 👩‍👩‍👧 \u200b\u2028\U0001f980"}],
    "empty text": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "white space": [{"role": "user", "content": "  \n\n\tdef f(x):\r\n    return x  \n"}],
    "special tokens in user text": [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nYes<|endoftext|>"}],
    "template syntax in user text": [{"role": "user", "content": "{{ 7 * 7 }} {% raw %} <b>&amp;</b> \\n"}],
}
# Each uses something that templates in the wild use, and ends its turns, so that answers can be cut.
TEMPLATES = {
    "blocks on lines of their own": """
        {%- for message in messages %}
            {% if message.role == 'user' %}
    U: {{ message.content | trim }}
            {% else %}
    A: {{ message.content }}<|im_end|>
            {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}
    A: {% endif %}""",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}<|im_end|>{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation tag": "{% set x = 'out' %}{% for m in messages %}{% generation %}{% set x = 'in' %}{{ x + m.content }}"
    "<|im_end|>{% endgeneration %}{{ x }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
    "namespace and slices": "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{{ m['content'].split('\\n')[-1].strip() }}{% endfor %}",
    "reversed": "{% for m in messages | reverse %}{{ m.role }}{% endfor %}{{ (messages | last).content | reverse }}",
    "special tokens by name": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token is defined }}",
    "absent tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ messages[0].name is defined }}",
}


class StoppedClock(datetime):
    """What transformers is given for a clock: ours, that stands still."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return FROZEN_DATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> "PreTrainedTokenizerBase":
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))


def change_config(folder: Path, name: str = "tokenizer_config.json", **changes: object) -> None:
    """Set keys of a JSON file; None takes a key away."""
    path = folder / name
    config = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def with_template(folder: Path, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chats_render_and_tokenize_as_in_transformers(
    tokenizer: Tokenizer, theirs: "PreTrainedTokenizerBase", chat: list[dict[str, str]], prompt: bool
) -> None:
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render(chat, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    assert tokenizer.encode(text) == ids
    assert tokenizer.prompt_ids(chat) == ids or not prompt
    assert tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_template_features_render_as_in_transformers(
    copy: Path, theirs: "PreTrainedTokenizerBase", template: str
) -> None:
    ours = with_template(copy, template)
    for chat in CHATS.values():
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(chat, add_generation_prompt=prompt) == text


def test_the_date_in_a_template_is_the_frozen_one(
    copy: Path, theirs: "PreTrainedTokenizerBase", monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ strftime_now('%Y-%m-%d %d %B %Y %H:%M') }}{{ messages[0].content }}"
    ours = with_template(copy, template).render([USER])
    assert ours.startswith(FROZEN_DATE.strftime("%Y-%m-%d"))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", StoppedClock)
    assert theirs.apply_chat_template([USER], chat_template=template, tokenize=False) == ours


def test_encoding_adds_nothing_and_parses_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    texts = ["", "a", "<|im_end|> b\n", "é 12"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert (tokenizer.vocab_size, tokenizer.special_tokens["bos_token"], tokenizer.end_ids) == (
        259,
        "<|im_start|>",
        {2},
    )


def test_truncation_and_padding_of_the_file_are_not_applied(copy: Path, tokenizer: Tokenizer) -> None:
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    change_config(copy, "tokenizer.json", truncation=truncation, padding=padding | {"pad_to_multiple_of": None})
    for text in ("a", "a long text of more than eight tokens"):
        assert load_tokenizer(copy).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("answer", ["Eight.", "", " a\n", "\n\nb", "x<|im_end|>\ny", "ends in <|im_end|>", "👩‍👩‍👧é"])
def test_prompt_and_completion_are_the_whole_chat_up_to_its_last_end(
    tokenizer: Tokenizer, theirs: "PreTrainedTokenizerBase", chat: list[dict[str, str]], answer: str
) -> None:
    prompt, completion = tokenizer.prompt_ids(chat), tokenizer.completion_ids(chat, answer)
    whole = theirs.apply_chat_template([*chat, {"role": "assistant", "content": answer}])["input_ids"]
    assert prompt + completion + tokenizer.encode("\n") == whole
    assert tokenizer.decode(completion) == answer + "<|im_end|>"


def test_a_turn_may_end_in_any_declared_or_known_end_token(copy: Path) -> None:
    ended = CHATML.replace("<|im_end|>\\n", "<|endoftext|>\\n")
    with pytest.raises(UserError, match="no end-of-turn token.*eos_token_id of generation_config.json"):
        with_template(copy, ended).completion_ids([USER], "Eight.")
    change_config(copy, "generation_config.json", eos_token_id=[0, 2])
    declared = load_tokenizer(copy)
    assert declared.completion_ids([USER], "Eight.")[-1] == 0
    for name in ("generation_config.json", "config.json"):
        change_config(copy, name, eos_token_id=None)
    change_config(copy, eos_token=None)
    (copy / "chat_template.jinja").unlink()
    known = load_tokenizer(copy)
    assert known.completion_ids([USER], "Eight.")[-1] == 2


@pytest.mark.parametrize("answer", ["Eight.", "x<|im_end|>y"])
def test_a_template_without_an_end_of_turn_is_refused(copy: Path, answer: str) -> None:
    tokenizer = with_template(copy, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match=f"{copy}.*no end-of-turn token"):
        tokenizer.completion_ids([USER], answer)


def test_a_template_that_rewrites_its_prompt_is_refused(copy: Path) -> None:
    tokenizer = with_template(
        copy, "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match=f"{copy} doesn't continue its prompt.*'1How.*'2How.*character 0"):
        tokenizer.completion_ids([USER], "Eight.")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages.append('x') }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_raises_is_a_users_error(copy: Path, template: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"chat template of {copy}.*\(system, user\).*{reason}"):
        with_template(copy, template).render(CHATS["system turn"])


def test_a_broken_template_names_its_line(copy: Path) -> None:
    with pytest.raises(UserError, match=f"{copy} has an error in its line 2: "):
        with_template(copy, "fine\n{% for m in %}")


def test_a_template_is_taken_from_the_first_of_its_places(copy: Path) -> None:
    def rendered() -> str:
        return load_tokenizer(copy).render([USER])

    change_config(
        copy, chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    )
    assert rendered() == "listed"
    change_config(copy, chat_template="from the config")
    assert rendered() == "from the config"
    assert with_template(copy, "from the jinja file").render([USER]) == "from the jinja file"
    (copy / "chat_template.jinja").unlink()
    for template in (None, [{"name": "rag", "template": "x"}]):
        change_config(copy, chat_template=template)
        with pytest.raises(UserError, match=f"{copy} has no chat template.*chat_template.jinja"):
            rendered()


def test_special_tokens_may_be_strings_or_objects(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    change_config(copy, bos_token={"__type": "AddedToken", "content": "<|endoftext|>", "special": True})
    assert load_tokenizer(copy).render([USER]) == "<|endoftext|><|im_end|>"


def test_missing_or_broken_files_are_named(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text('{\n "a": 1,\n}')
    with pytest.raises(UserError, match=r"tokenizer_config.json:3: broken JSON"):
        load_tokenizer(copy)
    (copy / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config.json: must hold one JSON object"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer's file"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{copy} has no tokenizer.json"):
        load_tokenizer(copy)
