"""Calibration: from what a decode and two scoring passes tell of an answer to the probability that it is right.

A map of a few numbers, logistic regression on raw features (Platt 1999), fitted on validation data by `python -m train.calibrate` and kept
in the sidecar.  It knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from lqa.errors import LqaError

CANNOT_TELL = "cannot tell from these activations"
# What is known of every answer: mean probability of its tokens; its mean log-probability (nats); the same, minus that without activations.
FEATURES = ("probability", "logprob", "grounded")


@dataclass(frozen=True)
class Calibration:
    """`confidence` = 1 / (1 + exp(-(intercept + sum of weight * feature))).

    threshold  below this confidence an answer is shown as CANNOT_TELL
    right      what the probability is of, in words
    fitted     on what: data, n, share of right answers
    """

    weights: dict[str, float]
    intercept: float
    threshold: float
    right: str
    fitted: dict = field(default_factory=dict)

    def confidence(self, features: Mapping[str, float]) -> float:
        """The probability in (0, 1) that an answer with these features is right."""
        z = self.intercept + sum(weight * features[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-z)) if z > -700 else 0.0

    def check(self) -> Calibration:
        """Raises LqaError for features that no answer has, or numbers that are none."""
        if unknown := sorted(set(self.weights) - set(FEATURES)):
            raise LqaError(f"The calibration uses the unknown feature {unknown[0]!r}; features are {', '.join(FEATURES)}.")
        numbers = [*self.weights.values(), self.intercept, self.threshold]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or not 0 <= self.threshold <= 1:
            raise LqaError("The calibration needs finite numbers and a threshold in [0, 1]; run `python -m train.calibrate` again.")
        return self

    @classmethod
    def load(cls, entry: dict) -> Calibration:
        """From the sidecar's `calibration`.  Raises LqaError if it is malformed."""
        try:
            return cls(**entry).check()
        except (TypeError, AttributeError) as error:
            raise LqaError(f"The sidecar's calibration is malformed ({error}); run `python -m train.calibrate` again.") from error

    def dump(self) -> dict:
        return asdict(self)


def fit(rows: Sequence[Mapping[str, float]], correct: Sequence[float], names: Sequence[str], **about) -> Calibration:
    """Fits the map by the features `names` to answers with the features `rows`, of which it is known whether they are `correct` (0 or 1).

    L2-regularised on standardised features.  about: `threshold`, `right`, `fitted` of the Calibration.

    Raises LqaError if all answers are right, or all wrong: there is nothing to fit.
    """
    from sklearn.linear_model import LogisticRegression

    labels = [int(r > 0.5) for r in correct]
    if len(set(labels)) < 2:
        raise LqaError(f"All {len(labels)} answers are {'right' if labels and labels[0] else 'wrong'}: there is nothing to calibrate on.")
    columns = [[row[name] for row in rows] for name in names]
    means = [sum(column) / len(column) for column in columns]
    # A constant feature tells nothing; it gets the weight 0 instead of a division by nothing.
    spreads = [math.sqrt(sum((x - m) ** 2 for x in column) / len(column)) or 1.0 for column, m in zip(columns, means, strict=True)]
    standard = [[(x - m) / s for x, m, s in zip(row, means, spreads, strict=True)] for row in zip(*columns, strict=True)]
    model = LogisticRegression(C=1.0).fit(standard, labels)
    weights = [float(w) / s for w, s in zip(model.coef_[0], spreads, strict=True)]
    intercept = float(model.intercept_[0]) - sum(w * m for w, m in zip(weights, means, strict=True))
    return Calibration(dict(zip(names, weights, strict=True)), intercept, **about)
