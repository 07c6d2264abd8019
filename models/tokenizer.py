"""Tokenizer and chat template of a Hugging Face model folder: messages -> text -> token ids, and the files back.

Rendering equals transformers' apply_chat_template, tokens equal its tokenizers'; both are tested. One difference is
meant: the template's clock stands still at FROZEN_DATE, so that tomorrow's prompt is today's, and cached reference
log-probs stay valid. A template that writes no beginning-of-sequence token gets none, as in transformers.
Read next: models/gguf_import.py and models/tiny.py write such folders; dpo/trees.py is where prompts become trees.
"""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from models.errors import UserError
from models.files import read_json_object, read_text, write_json

FROZEN_DATE = datetime(2026, 1, 1)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Ends of an assistant's turn in ChatML, Llama 3, Llama 4 and harmony, whose <|end|> ends a thought, not the turn. A
# folder's own eos ids come on top.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|call|>")
BOUNDARY = 100  # characters on each side of where the answer begins: no token of both sides reaches further
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is told

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Tokenizer:
    """A model folder's tokenizer and chat template. `load_tokenizer` makes it."""

    folder: Path
    special_tokens: Mapping[str, str]  # "bos_token" -> "<|im_start|>", ...: what the template may print
    variables: Mapping[str, object]  # what else it is told: "enable_thinking" -> False, ...
    end_ids: frozenset[int]  # an assistant's turn may end in these: generation stops at them
    backend: tokenizers.Tokenizer
    template: jinja2.Template

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may have more rows, never fewer."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Nothing is added; special tokens that stand in the text are parsed as such."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the token ids, special ones included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The chat as the model reads it. A template that raises is a UserError.

        A message's "thinking" is shown to the template as transformers does, under both of the names that are in use.
        """
        try:
            return self.template.render(
                messages=[
                    {**message, "reasoning_content": message["thinking"]} if "thinking" in message else dict(message)
                    for message in messages
                ],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **self.variables},
            )
        except Exception as error:  # a template is a foreign program: whatever it raises is about it and its messages
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template of {self.folder} refuses messages with the roles ({roles}): {error}; "
                "use roles that it allows, or a folder with another chat template"
            ) from error

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens of the chat up to where the assistant's next turn begins."""
        ids = self.encode(self.render(messages))
        if not ids:
            raise UserError(f"the chat template of {self.folder} writes nothing; put the model's own there")
        bos = self.special_tokens.get("bos_token", "")
        if ids[:2] == [self.backend.token_to_id(bos)] * 2:
            raise UserError(
                f"a chat begins with {bos} twice: the chat template of {self.folder} writes it twice, or the row's own "
                "text begins with it; take one away"
            )
        return ids

    def verdict_prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens up to where the text of the assistant's answer begins: prompt_ids, and how the template opens a turn.

        In harmony a verdict stands in the final channel, and after Qwen3's think block, also where the prompt has none.
        A token with a meaning of its own that a message spells is broken up: what is judged ends no turn.
        """
        plain = [
            message | {"content": self._marks.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", message["content"])}
            for message in map(dict, messages)
        ]
        return self.prompt_ids(plain) + self._opening[0]

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """The added tokens, longest first: those that are found in any text before it is split."""
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        marks = sorted((text for text in added if len(text.strip()) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, marks)) or "(?!)")

    def verdict_ids(self, label: str) -> list[int]:
        """Tokens of a one-word answer where verdict_prompt_ids ends, with the template's space if that is one token."""
        written = self.encode(self._opening[1] + label)
        return written if len(written) == 1 else self.encode(label)

    @functools.cached_property
    def _opening(self) -> tuple[list[int], str]:
        """What the template writes between prompt and answer: tokens if it has tags; a mere space is the answer's."""
        question = {"role": "user", "content": "?"}
        text = os.path.commonprefix([self._answered([question], answer)[1] for answer in "AB"])
        ids = self.encode(text)
        return (ids, "") if self.backend.get_added_tokens_decoder().keys() & set(ids) else ([], text)

    def completion_ids(self, messages: Messages, answer: str, thinking: str = "") -> list[int]:
        """Tokens of `answer` as the assistant's turn after `prompt_ids(messages)`, its end-of-turn token included.

        `thinking`, where there is any, comes before it as the template has it: in a channel or block of its own. Prompt
        and answer are encoded apart, as in generation. What the template writes after the end-of-turn token (ChatML's
        newline) is left out. UserError if it doesn't continue its own prompt, end the turn or show the thinking.
        """
        _, rest = self._answered(messages, answer, thinking)
        if thinking.strip() not in rest:
            raise UserError(
                f"the chat template of {self.folder} does not show an answer's thinking ({thinking[:40]!r}...); remove "
                "it from the row, or take a model that thinks"
            )
        ids = self.encode(rest)
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        if not ends or self.decode(ids[ends[-1] + 1 :]).strip():
            allowed = ", ".join(repr(self.backend.id_to_token(token)) for token in sorted(self.end_ids)) or "none known"
            raise UserError(
                f"the chat template of {self.folder} writes no end-of-turn token after the answer: it ends in "
                f"{rest[-40:]!r}, allowed ends: {allowed}; mend the template, or name its end in eos_token_id of "
                "generation_config.json"
            )
        return ids[: ends[-1] + 1]

    def boundary_differs(self, messages: Messages, answer: str, thinking: str = "") -> bool:
        """Whether the answered chat, encoded in one piece, has other tokens than its prompt and its rest apart."""
        prompt, rest = self._answered(messages, answer, thinking)
        before, after = prompt[-BOUNDARY:], rest[:BOUNDARY]
        return self.encode(before + after) != self.encode(before) + self.encode(after)

    def _answered(self, messages: Messages, answer: str, thinking: str = "") -> tuple[str, str]:
        """The answered chat in two: the prompt, and what the template writes after it.

        Where the answered chat doesn't continue the prompt, the last message's own decides: some of Mistral's templates
        show the system turn in a chat that ends in the user's turn, and not in an answered one.
        """
        reply = {"role": "assistant", "content": answer} | ({"thinking": thinking} if thinking else {})
        rendered = []
        for turns in (messages, messages[-1:]):
            prompt, whole = self.render(turns), self.render([*turns, reply], add_generation_prompt=False)
            rendered.append((prompt, whole))
            if whole.startswith(prompt):
                return rendered[0][0], whole[len(prompt) :]
        prompt, whole = rendered[0]
        at = len(os.path.commonprefix([prompt, whole]))
        raise UserError(
            f"the chat template of {self.folder} doesn't continue its prompt with the answer: the prompt has "
            f"{prompt[at : at + 40]!r} where the answered chat has {whole[at : at + 40]!r} (character {at}); "
            "use a template whose generation prompt is how it begins an assistant's turn, or tell it so in "
            "model.template_variables"
        )


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """What a model folder's tokenizer.json says. UserError where it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json; allowed: a Hugging Face model folder with the fast tokenizer's file. "
            "Download it with the model, or write it with transformers' tokenizer.save_pretrained"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer's file ({error}); download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_variables(settings: Sequence[str]) -> dict[str, object]:
    """What `model.template_variables` says, NAME=VALUE each: VALUE as JSON where it is JSON, else as text."""
    variables: dict[str, object] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier() or name in (*GIVEN, *variables):
            raise UserError(
                f"model.template_variables = {setting!r}: must be NAME=VALUE, a name once and none of "
                f"{', '.join(GIVEN)}; e.g. enable_thinking=false"
            )
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


def load_tokenizer(folder: Path, variables: Mapping[str, object] = {}) -> Tokenizer:
    """Tokenizer, chat template and end tokens of a Hugging Face model folder. UserError for what is missing or broken.

    The template is chat_template.jinja, else tokenizer_config.json's; `variables` (of read_variables) is what it is
    told beside the messages.
    """
    backend = read_backend(folder)
    config = _read_optional(folder / "tokenizer_config.json")
    # Configs write a token as a string or as {"content": string, ...}.
    named = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    special_tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
    ids = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    end_ids = {ids[text] for text in (*END_OF_TURN, special_tokens.get("eos_token")) if text in ids}
    for name in ("generation_config.json", "config.json"):
        declared = _read_optional(folder / name).get("eos_token_id")
        end_ids |= {i for i in (declared if isinstance(declared, list) else [declared]) if isinstance(i, int)}
    template = _compile_template(folder, _find_template(folder, config))
    return Tokenizer(folder, special_tokens, variables, frozenset(end_ids), backend, template)


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE as SmolLM2's: each digit alone, GPT-2's splitting, no added beginning.

    `tokens[i]` is the text of id i in the byte alphabet, `special` are some of them, `merges` are "left right" by rank.
    """
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def write_tokenizer(
    folder: Path, backend: tokenizers.Tokenizer, chat_template: str, *, bos_id: int, eos_id: int, pad_id: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json, as transformers reads them."""
    backend.save(str(folder / "tokenizer.json"))
    ids = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: backend.id_to_token(token) for name, token in ids.items()},
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {f"{name}_id": token for name, token in ids.items()})


def _read_optional(path: Path) -> dict[str, object]:
    return read_json_object(path) if path.is_file() else {}


def _find_template(folder: Path, config: Mapping[str, object]) -> str:
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    elif isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if not isinstance(template, str) or not template.strip():
        raise UserError(
            f"{folder} has no chat template; it is looked for in chat_template.jinja, then chat_template of "
            "tokenizer_config.json (of a list, the one named default). Take the instruction-tuned model, or put a "
            "chat_template.jinja there"
        )
    return template


def _compile_template(folder: Path, template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FROZEN_DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {folder} has an error in its line {error.lineno}: {error.message}; "
            "mend it, or put the model's own chat_template.jinja there"
        ) from error


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text in some templates; it renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A scope of its own, so that what is set inside stays inside, as in transformers."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
