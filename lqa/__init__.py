"""lqa: read a language model's activations in natural language, and steer the model in natural language.

    import lqa

    decoder = lqa.LatentDecoder.from_pretrained()
    reading = decoder.read([{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], span="user")
    answers = reading.ask(["Who is the assistant pretending to be?"], grounding=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqa.errors import LqaError

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Base",
    "DecoderConfig",
    "Grounding",
    "LatentDecoder",
    "LqaError",
    "Reading",
    "Score",
    "Steering",
    "TokenScore",
    "load_base",
]

if TYPE_CHECKING:
    from lqa.config import DecoderConfig
    from lqa.decoder import Answer, Grounding, LatentDecoder, Reading, Score, TokenScore
    from lqa.models import Base, load_base
    from lqa.steering import Steering

_HOMES = {"DecoderConfig": "lqa.config", "Base": "lqa.models", "load_base": "lqa.models", "Steering": "lqa.steering"}


def __getattr__(name: str):
    # Imported on first use: torch and transformers take seconds, and a mistyped command should not wait for them.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_HOMES.get(name, "lqa.decoder")), name)
    raise AttributeError(f"module 'lqa' has no attribute {name!r}")
