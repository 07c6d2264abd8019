"""python -m dpo.attack data.path=rows.jsonl judge.attacks=all out=FOLDER: row files whose wrong answers attack.

    rows of any format -> FOLDER/FAMILY.jsonl in ours, one a family

All but the wrong answers stays, ids and splits too, and an answer is rewritten as judge.attacks does it under the same
seed. No dimension letters. Read next: dpo/judge/attacks.py.
"""

import sys
from collections import Counter
from pathlib import Path

from dpo.config import Config
from dpo.inputs import check_place, data_rows
from dpo.judge.attacks import ATTACKS, attacked, families_of
from dpo.rows import write_rows
from dpo.settings import load_config
from models.errors import UserError, exit_code

USAGE = f"""\
usage: python -m dpo.attack data.path=ROWS judge.attacks=FAMILY,... out=FOLDER [seed=N] [key=value ...]
  python -m dpo.attack data.path=rows.jsonl judge.attacks=verdict,length out=attacked
  python -m dpo.attack exp=quickstart judge.attacks=all out=attacked    (the rows of that training, all splits)

judge.attacks: {", ".join(ATTACKS)},
or all. Other keys that matter: data.format, seed, and those of checkable; all are told by python -m dpo.train --help"""


def write_attacked(config: Config, out: Path) -> None:
    """Write data.path's rows under each of judge.attacks into `out`; UserError, and nothing, where one is there."""
    paths = {family: out / f"{family}.jsonl" for family in families_of(config.judge.attacks)}
    if not paths:
        raise UserError(f"judge.attacks: names none; write judge.attacks=all, or some of {', '.join(ATTACKS)}")
    if there := next((path for path in paths.values() if path.exists()), None):
        raise UserError(f"out={out}: {there} is there already; choose another folder, or remove it")
    check_place("out", out)
    dropped: Counter[str] = Counter()
    rows, _ = data_rows(config, dropped)
    for reason, count in dropped.items():
        print(f"left out as no preference: {count:,} rows ({reason})")
    for family, path in paths.items():
        write_rows(path, (attacked(row, family, config.seed) for row in rows))
        print(f"{path}: {len(rows):,} rows")


def main(argv: list[str]) -> int:
    """The command line: 0 when all is written, else exit_code's."""

    def command() -> None:
        out = next((argument.removeprefix("out=") for argument in argv if argument.startswith("out=")), "")
        if not out:
            raise UserError(f"out is missing: say into which folder, e.g. out=attacked\n{USAGE}")
        rest = [argument for argument in argv if not argument.startswith("out=")]
        named = any(argument.startswith("exp=") for argument in rest)
        write_attacked(load_config(rest if named else ["exp=judge", *rest]), Path(out).expanduser())

    return exit_code(command, argv, USAGE, "the files that were told of are whole")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
