"""Published models' shapes, as fields of their config.json: what memory and time depend on, without a download.

No dimension letters. Rotary constants are left out: these are for planning and counting, not for running.
Read next: models/published.toml, models/families/__init__.py (parse_model_config), models/decoder.py.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from models.config import Fields

_FILE = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
PUBLISHED: Mapping[str, Fields] = {
    name: entry["fields"] | dict(zip([*_FILE["shape"], *entry.get("more", [])], numbers, strict=True))
    for entry in _FILE["entry"]
    for name, numbers in entry["models"].items()
}
