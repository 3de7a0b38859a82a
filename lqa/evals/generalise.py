"""The suite `generalise`: behaviours of which no QA of the training corpus tells, measured as in lqa.evals.steer_persona."""

from lqa.evals.steer_persona import check, run

__all__ = ["check", "run"]
