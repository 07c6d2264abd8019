"""The README.md of an exported judge: what it is, how to ask it, how well it judges, on what, and where it fails.

    a trained run and its report's page -> model card, in the Hub's form

No dimension letters. Read next: dpo/report.py, which writes it beside the weights.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo.inputs import cache_folder, judge_settings
from dpo.judged import Run
from dpo.page import Block, Page, Plot, Text, to_markdown
from dpo.report_run import percent, summary
from models.errors import UserError
from models.gguf_import import SMOLLM2, resolve_model_path
from models.hub import is_hub_id
from models.tokenizer import load_tokenizer, read_variables

KEPT = ("Verdicts", "By subset", "Position and looks", "Attacks", "Data", "Again")  # of the report's sections
KNOWN = {SMOLLM2: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
FRONT = re.compile(r"\A---\n(.*?)\n---", re.S)


def base_model(run: Run) -> tuple[str, str]:
    """Hub id and licence of the model that was trained, as far as its path and its own README.md tell; else ""."""
    path = run.config.model.path
    if path in KNOWN:
        return KNOWN[path]
    try:
        readme = resolve_model_path(path, cache_folder(run.config)) / "README.md"
        front = FRONT.match(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    except (UserError, OSError, UnicodeDecodeError):
        front = None
    said = re.search(r"^license: *([\w.-]+) *$", front[1], re.M) if front else None
    return path.partition("@")[0] if is_hub_id(path) else "", said[1] if said else ""


def limits(run: Run) -> list[Text]:
    """What its figures say against it, and what they cannot say."""
    judge = run.results["judge"]
    trained = judge["trained"]
    subsets = {name: of["averaged_interval"] for name, of in trained["subsets"].items()}
    chance = [f"{name} [{100 * low:.0f}, {100 * high:.0f}]" for name, (low, high) in subsets.items() if low <= 0.5]
    least = judge["comparison"]["averaged"]["minimum_detectable"]
    shows = f", which show differences of {100 * least:.1f} points or more" if least else ""
    told = [
        f"It is {judge['conclusion']}.",
        f"It says A in {percent(trained['raw_a_rate'])} of its verdicts and gives the same verdict in both orders for "
        f"{percent(trained['position_consistency'])} of the pairs: ask both orders and average the log-odds.",
        f"Not shown to be above chance, order-averaged, in per cent: {', '.join(chance)}." if chance else "",
        f"{trained['n']:,} pairs were judged{shows}; other rows, languages and lengths were not measured."
        + ("" if run.results.get("attacks") else " Nor was what an answer written to win does to it."),
        "Break up what spells a special token of its chat template in a text, as python -m dpo.judge does: it would be "
        "read as that token.",
    ]
    return [Text("paragraph", line) for line in told if line]


def served(settings: list[str], folder: Path) -> tuple[str, str]:
    """What the command that asks a server adds so that it renders the chat as here, and a warning where it cannot.

    `settings`: model.template_variables.
    """
    variables = read_variables(settings)
    try:
        ours, bare = (load_tokenizer(folder, told) for told in (variables, {}))
    except UserError:
        return "", ""
    asked = [{"role": "user", "content": "?"}]
    extra = json.dumps([f"chat_template_kwargs={json.dumps(variables)}"])
    more = f" {shlex.quote(f'endpoint.extra={extra}')}" if ours.render(asked) != bare.render(asked) else ""
    opening = ours.decode(ours.verdict_prompt_ids(asked)[len(ours.prompt_ids(asked)) :])
    if not opening:
        return more, ""
    return more, (
        f"Here its verdict stands right behind {opening!r}. A server does not write that for it: there it thinks first "
        "(raise endpoint.max_tokens), and is another judge than the one that was measured here."
    )


def how_to_ask(run: Run, folder: Path) -> list[Text]:
    """Commands, and the template of its question."""
    judge, critiques = run.config.judge, run.config.critiques
    template = judge_settings(run.config, sighted=judge.sighted).template
    sight = "" if judge.sighted else " judge.sighted=false"
    here = there = f" judge.template={judge.template}" if judge.template else ""
    how = f"Its reply's first token is its verdict, {' or '.join(template.labels)}"
    if judge.critique != "off":
        own = f" critiques.template={critiques.template}" if critiques.template else ""
        here = f" judge.critique={judge.critique}{own} critiques.max_tokens={critiques.max_tokens}"
        there = f" judge.template={critiques.template or template.name} endpoint.max_tokens={critiques.max_tokens}"
        how = f"It writes a critique, then its verdict, {' or '.join(template.labels)}, on a line of its own"
    more, warning = served(run.config.model.template_variables, folder)
    commands = (
        f"python -m dpo.judge model.path=THIS_FOLDER data.path=rows.jsonl{sight}{here}\n"
        "vllm serve THIS_FOLDER --served-model-name judge\n"
        "python -m dpo.judge endpoint.url=http://localhost:8000/v1 endpoint.model=judge data.path=rows.jsonl"
        f"{sight}{there}{more}"
    )
    text = (
        f"{how}; it was asked in these words (system, then user, in Jinja's notation), with the answers in both orders:"
    )
    asked = f"{template.system.strip()}\n\n{template.user.strip()}"
    warnings = [Text("paragraph", warning)] if warning else []
    return [Text("command", commands), *warnings, Text("paragraph", text), Text("command", asked)]


def model_card(run: Run, sections: Mapping[str, Sequence[Block]], folder: Path) -> str:
    """The card of what the run exported to `folder`, from its report's sections."""
    base, licence = base_model(run)
    files = sorted(path.name for pattern in ("LICENSE*", "NOTICE*") for path in folder.glob(pattern))
    front = {"license": licence, "base_model": base, "library_name": "transformers"}
    lines = [f"{key}: {value}" for key, value in front.items() if value]
    origin = f"Trained from {run.config.model.path}" + (f" ({base})" if base not in ("", run.config.model.path) else "")
    terms = licence or "not said in its folder: ask who published it"
    terms += f"; see {', '.join(files)}" if files else ""
    kept = {
        name: [block for block in sections[name] if not isinstance(block, Plot)] for name in KEPT if name in sections
    }
    page = Page(
        f"A judge of answers: {run.config.exp}",
        [*summary(run), Text("paragraph", f"{origin}; its licence, which goes for this model too: {terms}.")],
        {"How to ask it": how_to_ask(run, folder), "Limits": limits(run), **kept},
    )
    return "\n".join(["---", *lines, "tags: [llm-as-a-judge, dpo]", "---", "", to_markdown(page)])
