"""Fits a decoder's calibration and stores it in its sidecar:  python -m train.calibrate DECODER [--limit N] [--threshold X]

Fitted on the corpus's validation split, on which the decoder was not trained: free answers to the generic questions under one message
(lqa.evals.calibration).  From then on `Answer.confidence` is the probability that an answer is right, and below the threshold
it counts as "cannot tell from these activations".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from lqa.calibration import Calibration
from lqa.config import DecoderConfig
from lqa.corpus import revision
from lqa.decoder import LatentDecoder
from lqa.errors import LqaError
from lqa.evals import calibration as suite
from lqa.evals import data
from lqa.evals.identify import M, make_draws
from lqa.evals.suite import Job
from lqa.journal import Journal


def calibrate(decoder: LatentDecoder, *, limit: int | None = None, seed: int = 0, threshold: float = suite.THRESHOLD) -> Calibration:
    """The calibration of a decoder.  Raises LqaError if there are too few items, or the answers are all right or all wrong."""
    items, source = data.corpus_items("validation")
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder, "journal.jsonl"), {}) as journal:
        job = Job("calibration", decoder, journal, data=None, limit=limit, seed=seed)
        entries = suite.measure(job, make_draws(job.limited(items), M, seed), "validation", everything=False)
    return replace(suite.fit_answers(entries, data=source["name"], corpus=revision()), threshold=threshold).check()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.calibrate", description="Fit a decoder's confidence; store it in the sidecar.")
    parser.add_argument("decoder", type=Path, help="a decoder's folder; its sidecar is written")
    parser.add_argument("--limit", type=int, metavar="N", help="use at most N items, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    text = f"confidence below which it cannot tell (default: {suite.THRESHOLD})"
    parser.add_argument("--threshold", type=float, default=suite.THRESHOLD, metavar="X", help=text)
    options = parser.parse_args(argv)
    try:
        if not options.decoder.is_dir():
            raise LqaError(f"There is no decoder folder {options.decoder}; export a training run first (python -m train.export).")
        if options.limit is not None and options.limit < 1:
            raise LqaError(f"--limit must be at least 1, not {options.limit}.")
        found = calibrate(
            LatentDecoder.from_pretrained(options.decoder), limit=options.limit, seed=options.seed, threshold=options.threshold
        )
        replace(DecoderConfig.load(options.decoder), calibration=found.dump()).save(options.decoder)
    except (LqaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
