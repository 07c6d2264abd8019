"""Text of rows, names and commands, made safe to show: nothing in it is markup, hides or turns what stands beside it.

No dimension letters. Read next: dpo/page.py and dpo/plots.py, which show it.
"""

import html
import re

# Controls, marks that turn or hide what follows, "tag" letters that nobody sees, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with every character that would turn or hide others, or is none, spelled out as [U+202E]."""
    return UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def escaped(text: str) -> str:
    """The text, visible, for HTML and SVG."""
    return html.escape(visible(text))
