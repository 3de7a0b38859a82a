"""Steering: say how the target should behave, and a LoRA trained through the decoder makes it so.

    steering = decoder.steer(control="Speak like a pirate.")      # or qa=[(question, answer), ...]
    with steering.apply(strength=1.0):
        print(decoder.generate(chat))
"""

from lqa.steering.neutral import load_neutral
from lqa.steering.pairs import check_pairs, load_pairs, write_pairs
from lqa.steering.steering import SIDECAR, Steering, check_strength, read_sidecar
from lqa.steering.strength import auto_strength, strongest
from lqa.steering.training import Cancelled, Progress, Settings, steer

__all__ = [
    "SIDECAR",
    "Cancelled",
    "Progress",
    "Settings",
    "Steering",
    "auto_strength",
    "check_pairs",
    "check_strength",
    "load_neutral",
    "load_pairs",
    "read_sidecar",
    "steer",
    "strongest",
    "write_pairs",
]
