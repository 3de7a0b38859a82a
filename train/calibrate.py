"""Fits a decoder's guidance and calibration and stores them in its sidecar:  python -m train.calibrate DECODER [--guidance G ...]

Fitted on the corpus's validation split, on which the decoder was not trained: free answers to the generic questions under one message
(lqa.evals.calibration).  Of several guidances (lqa.engine.guided) the one with most right answers is taken, the smaller one of equals.
From then on `Answer.confidence` is the probability that an answer is right, and below the threshold it counts as "cannot tell from
these activations".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
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


def calibrate(
    decoder: LatentDecoder,
    guidance: Sequence[float] = (),
    *,
    limit: int | None = None,
    seed: int = 0,
    threshold: float = suite.THRESHOLD,
) -> DecoderConfig:
    """The decoder's sidecar with the best of `guidance` (none: its own) and the calibration that goes with it.

    Raises LqaError for a guidance below 0, if there are too few items, or if the answers are all right or all wrong.
    """
    items, source = data.corpus_items("validation")
    given, found = decoder.config, {}
    try:
        for weight in sorted(set(guidance) or {given.guidance}):
            decoder.config = replace(given, guidance=weight).check()
            with tempfile.TemporaryDirectory() as folder, Journal(Path(folder, "journal.jsonl"), {}) as journal:
                job = Job("calibration", decoder, journal, data=None, limit=limit, seed=seed)
                found[weight] = suite.measure(job, make_draws(job.limited(items), M, seed), "validation", everything=False)
    finally:
        decoder.config = given
    shares = {weight: round(sum(e["right"] for e in entries) / len(entries), 4) for weight, entries in found.items()}
    best = max(shares, key=shares.get)  # the first of equals
    about = {"data": source["name"], "corpus": revision()}
    if len(shares) > 1:
        about["guidance"] = {str(weight): share for weight, share in shares.items()}
    calibration = replace(suite.fit_answers(found[best], **about), threshold=threshold).check()
    return replace(given, guidance=best, calibration=calibration.dump())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.calibrate", description="Fit a decoder's guidance and confidence; store them.")
    parser.add_argument("decoder", type=Path, help="a decoder's folder; its sidecar is written")
    parser.add_argument("--limit", type=int, metavar="N", help="use at most N items, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    text = f"confidence below which it cannot tell (default: {suite.THRESHOLD})"
    parser.add_argument("--threshold", type=float, default=suite.THRESHOLD, metavar="X", help=text)
    text = "how much answers are held against those without activations; of several the best is taken (default: the sidecar's)"
    parser.add_argument("--guidance", type=float, nargs="+", default=[], metavar="G", help=text)
    options = parser.parse_args(argv)
    try:
        if not options.decoder.is_dir():
            raise LqaError(f"There is no decoder folder {options.decoder}; export a training run first (python -m train.export).")
        if options.limit is not None and options.limit < 1:
            raise LqaError(f"--limit must be at least 1, not {options.limit}.")
        decoder = LatentDecoder.from_pretrained(options.decoder)
        found = calibrate(decoder, options.guidance, limit=options.limit, seed=options.seed, threshold=options.threshold)
        found.save(options.decoder)
    except (LqaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"guidance {found.guidance}; {Calibration.load(found.calibration)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
