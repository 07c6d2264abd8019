"""python -m dpo.study [exp=study] [key=value ...]: judges trained every way that [sweep] says, endpoints, one report.

    [sweep] -> arms (dpo/sweep.py) -> study.endpoints, asked for the same test rows -> dpo.report of all of them

An endpoint is asked in every way that the arms judge in, sighted and blind. The same command goes on where it was
stopped, and does nothing twice. No dimension letters. Read next: dpo/sweep.py, dpo/judge/__main__.py.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dpo.arms import begun_folder, check_sources, finished_folder
from dpo.judge.__main__ import run as judge_rows
from dpo.judge.endpoint import request_of
from dpo.report import write_report
from dpo.settings import Arm, load_config, load_sweep
from dpo.sweep import sweep
from models.errors import UserError, exit_code

USAGE = """\
usage: python -m dpo.study [exp=NAME] [key=value ...]      (exp=study where none is given)
  python -m dpo.study data.path=rows.jsonl data.rows=240 judge.rows=100
  python -m dpo.study exp=study-large       (RewardBench 2, gpt-oss-120b)

All keys: python -m dpo.train --help; more arms: sweep.KEY=VALUES, as of python -m dpo.sweep"""


def endpoint_arms(arms: Sequence[Arm]) -> list[Arm]:
    """What to ask of study.endpoints whose key is in the environment, one for each way that the arms judge in."""
    ways = {arm.config.judge.model_dump_json(): arm for arm in reversed(arms)}
    home = Path(arms[0].config.run.root).parents[1] / arms[0].config.exp
    found, names = [], Counter[str]()
    for said in arms[0].config.study.endpoints:
        model, url, *more = said.split() if len(said.split()) > 1 else (said, "")
        variable = next((word for word in more if "=" not in word), "")
        if variable and not os.environ.get(variable):
            print(f"{model}: left out, for the environment has no {variable}")
            continue
        name = re.sub(r"[^\w.-]", "_", model)
        names[name] += 1  # a model may be asked at two places, or in two ways
        name += f".{names[name]}" * (names[name] > 1)
        key = [f"endpoint.api_key_env={variable}"] * bool(variable)
        extra = [f"endpoint.extra={json.dumps([word for word in more if '=' in word])}"]
        for number, arm in enumerate(reversed(ways.values()), 1):
            given = [argument for argument in arm.argv if not argument.startswith("run.root=")]
            root = home / "endpoints" / f"{name}-{number}"
            asked = [f"endpoint.url={url}", f"endpoint.model={model}", *key, *extra]
            argv = [*given, f"run.root={root}", "judge.split=test", *asked]
            try:
                found.append(Arm({}, f"study.endpoints: {said}", argv, load_config(argv)))
                request_of((), found[-1].config.endpoint)
            except UserError as error:
                raise UserError(
                    f"study.endpoints = {said!r}: MODEL URL [KEY_VARIABLE] [NAME=VALUE ...]: {error}"
                ) from None
    return found


def study(arms: Sequence[Arm]) -> int:
    """Train, ask, report; 1 where an arm or an endpoint failed, else 0."""
    asked = endpoint_arms(arms)
    check_sources(asked, {}, any_source=False, judging=True)
    failed = int(bool(sweep(arms, {}, 1, any_source=False)))
    folders = [folder for arm in arms if (folder := finished_folder(arm))]
    for arm in asked:
        try:
            begun = begun_folder(arm, judging=True)
            folders.append(begun if begun and (begun / "results.json").is_file() else judge_rows(arm.config))
        except UserError as error:
            print(f"{arm.sources}: {error}; going on without it", file=sys.stderr)
            failed = 1
    if folders:
        home = write_report(folders, home=Path(arms[0].config.run.root).parents[1] / arms[0].config.exp)
        print(f"report: {home / 'report.html'}")
    return failed


def main(argv: list[str]) -> int:
    """The command line: 0 when all is judged, 1 where an arm or an endpoint failed, else exit_code's."""
    named = any(argument.startswith("exp=") for argument in argv)
    stopped = "finished arms and answers are whole; the same command goes on from here"
    return exit_code(lambda: study(load_sweep(argv if named else ["exp=study", *argv])), argv, USAGE, stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
