"""Verdicts in others' shapes: the result rows of the service's `compare`, JudgeBench's judged pairs.

The chosen answer stands as A in both. A local judge writes no text: its letter stands for what it would have written.
No dimension letters. Read next: dpo/judged.py, which reads the run; dpo/export.py, the command.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpo.inputs import judge_settings
from dpo.judge.local import OF_ANSWERS
from dpo.judge.prompts import judge_messages, request_text
from dpo.judged import Run, read_run
from dpo.rows import Row
from dpo.trees import TreeSettings
from models.errors import UserError
from models.files import atomic_write_text, read_text

Record = dict[str, object]


class Pass(NamedTuple):
    """One order of a pair as it was judged: what the judge wrote, and the letter of the place that it prefers."""

    answers: tuple[str, str]  # in the places A and B
    text: str
    letter: str | None  # "A", "B", "Tie" of log-odds that are exactly 0; None where the verdict cannot be read


class Judgement(NamedTuple):
    """One pair, its chosen answer first and then second."""

    id: str
    row: Row
    original: Pass
    flipped: Pass


def judgements(run: Run, role: str) -> Iterator[Judgement]:
    """What the run's judge `role` said of each pair. UserError where it compared none, or the rows are gone."""
    protocol = run.config.judge.protocol
    if protocol != "compare":
        raise UserError(f"{run.folder}: judge.protocol={protocol} has no two orders; these are of compare")
    if run.rows.missing:
        raise UserError(f"{run.folder}: {run.rows.missing}")
    written, path = {}, run.folder / "answers.jsonl"
    for line in read_text(path).splitlines() if path.is_file() else ():
        said = json.loads(line)
        written[said["id"], said["question"]] = said["text"]
    seen: Counter[str] = Counter()
    for verdict in run.verdicts[role]:
        row = run.rows.rows[run.rows.place[verdict.id]]
        chosen, rejected = row.chosen[verdict.pair[0]], row.rejected[verdict.pair[1]]
        passes = []
        for answers, odds in (((chosen, rejected), verdict.first), ((rejected, chosen), verdict.second)):
            letter = None if math.isnan(odds) else "A" if odds > 0 else "B" if odds < 0 else "Tie"
            passes.append(Pass(answers, written.get((row.id, seen[row.id]), letter or ""), letter))
            seen[row.id] += 1
        yield Judgement(f"{row.id} {verdict.pair}" if any(verdict.pair) else row.id, row, *passes)


def together_row(of: Judgement, settings: TreeSettings, role: str) -> Record:
    """A line of the service's result file: its flipped choice is in terms of the original order.

    An unreadable pass leaves the decision to the other one; with none there is none.
    """
    other_place = {"A": "B", "B": "A"}
    first, flipped = of.original.letter, of.flipped.letter
    second = flipped and other_place.get(flipped, flipped)
    decided = first if second in (first, None) else second if first is None else "Tie"
    return {
        "id": of.id,
        "category": of.row.subset,
        "prompt": request_text(of.row.prompt),
        "MODEL_TO_EVALUATE_OUTPUT_A": of.original.answers[0],
        "MODEL_TO_EVALUATE_OUTPUT_B": of.original.answers[1],
        "judge_raw_output_original": of.original.text,
        "judge_raw_output_flipped": of.flipped.text,
        "choice_original": first,
        "judge_feedback_original_order": of.original.text,
        "choice_flipped": second,
        "judge_feedback_flipped_order": of.flipped.text,
        "final_decision": decided,
        "evaluation_successful": decided is not None,
        "is_invalid_judge_output": first is None or second is None,
    }


def judgebench_row(of: Judgement, settings: TreeSettings, role: str) -> Record:
    """A line of JudgeBench's output file: a decision is in terms of the order that the judge saw."""
    prompt, template = of.row.prompt, settings.template
    sighted = {"sighted": True, "blind": False}.get(role, settings.sighted)
    reference = of.row.reference_answer if settings.reference_answer else ""
    decisions = {"A": "A>B", "B": "B>A", "Tie": "A=B"}

    def judgment(one: Pass) -> Record | None:
        if one.letter is None:
            return None
        system, user = judge_messages(prompt, one.answers, template, sighted=sighted, reference=reference)
        said = {"judge_model": role, "prompt": f"{system['content']}\n\n{user['content']}", "response": one.text}
        return {"judgment": said, "decision": decisions[one.letter]}

    return {
        "pair_id": of.id,
        "original_id": of.row.id,
        "source": of.row.subset,
        "question": request_text(of.row.prompt),
        "response_model": "unknown",
        "response_A": of.original.answers[0],
        "response_B": of.original.answers[1],
        "label": "A>B",
        "judge_name": role,
        "judgments": [judgment(of.original), judgment(of.flipped)],
    }


Shape = Callable[[Judgement, TreeSettings, str], Record]
SHAPES: dict[str, Shape] = {"together": together_row, "judgebench": judgebench_row}
"""--verdicts -> a line of the file."""


def write_verdict_files(folder: Path, shape: str) -> list[Path]:
    """Write RUN/SHAPE-JUDGE.jsonl for each judge of the run in `folder`; their paths."""
    run, paths = read_run(folder), []
    settings = judge_settings(run.config, sighted=run.config.judge.sighted)
    for role in (role for role in run.verdicts if role in run.results["judge"] and role not in OF_ANSWERS):
        lines = [json.dumps(SHAPES[shape](of, settings, role)) + "\n" for of in judgements(run, role)]
        paths.append(folder / f"{shape}-{role.replace('/', '_')}.jsonl")
        atomic_write_text(paths[-1], "".join(lines))
    return paths
