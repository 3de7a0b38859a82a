"""The linear probe (Alain and Bengio 2017, arXiv 1610.01644): multinomial logistic regression on activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lqa.errors import LqaError

STRENGTHS = (1e-3, 1e-1, 1e1)  # C, from which the inner folds choose
FOLDS = 5


def cross_validated(activations: Tensor, labels: Sequence[str], groups: Sequence[str], *, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Log-probabilities (R, C) of the C labels for R activations (R, D), each from a probe that saw nothing of its group.

    Groups (subjects, messages) are never in training and test at once.  The features are standardised and C is chosen inside each fold's
    training part, by the same kind of folds.  A label that a fold's training part lacks has the log-probability -inf there; so has
    everything where a single label is left to train on.

    Raises LqaError if there are fewer than two groups.
    """
    x, y, g = activations.float().cpu().numpy(), np.array(labels), np.array(groups)
    names = sorted(set(labels))
    if len(set(groups)) < 2:
        raise LqaError("A probe needs at least two groups to be cross-validated; give more data.")
    out = np.full((len(y), len(names)), -np.inf)
    for train, test in GroupKFold(min(FOLDS, len(set(groups))), shuffle=True, random_state=seed).split(x, y, g):
        if len(set(y[train])) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
        # Scored by accuracy: an inner fold may lack a label, which only a loss would mind.
        inner = min(3, len(set(g[train])))
        if inner > 1 and all(len(set(y[part])) > 1 for part, _ in GroupKFold(inner).split(x[train], y[train], g[train])):
            model = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=GroupKFold(inner), scoring="accuracy")
            model.fit(x[train], y[train], groups=g[train])
        else:
            model.fit(x[train], y[train])
        columns = [names.index(name) for name in model.classes_]
        out[np.ix_(test, columns)] = model.predict_log_proba(x[test])
    return out, names


def learnable(labels: Sequence[str], groups: Sequence[str]) -> set[str]:
    """The labels that at least two groups have: what a probe could name in a group that it has not seen."""
    return {label for label, n in Counter(label for label, _ in set(zip(labels, groups, strict=True))).items() if n > 1}
