"""The method: from preference rows to a trained and measured judge. Read next: config.py, then train.py.

Importing it checks that `kernels` is the package beside it, not the Hugging Face distribution of that name.
"""

import importlib.util
import sys
from pathlib import Path

from models.errors import UserError


def _check_kernels() -> None:
    """Stops where `import kernels` would find another project's package; looks only, imports nothing."""
    ours = Path(__file__).resolve().parents[1] / "kernels"
    spec = importlib.util.find_spec("kernels")
    found = [Path(folder).resolve() for folder in (spec.submodule_search_locations or ())] if spec else []
    if ours not in found:
        where = f"another project's package: {found[0]}" if found else "nowhere"
        raise UserError(
            f"the package `kernels` was found {where}; expected {ours}. Hugging Face distributes one of the same name: "
            "run `pip uninstall kernels` in this environment, or start from the folder of this repository"
        )


try:
    _check_kernels()
except UserError as mistake:
    if sys.argv[0] != "-m":  # imported, not started by `python -m dpo....`, whose main is not reached yet
        raise
    print(f"error: {mistake}", file=sys.stderr)
    raise SystemExit(2) from None
