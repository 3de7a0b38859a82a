"""Whether a free answer names something: the metric of suites whose right answer is a name."""

from __future__ import annotations

import re
import unicodedata


def normalised(text: str) -> str:
    """Lower case, without accents; runs of anything but letters and digits are one space."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", plain))


def contains(text: str, name: str) -> bool:
    """Whether `text` contains `name` as words, accents and case aside; a plural of its last word counts."""
    return bool(name.strip()) and re.search(rf"\b{re.escape(normalised(name))}(s|es)?\b", normalised(text)) is not None
