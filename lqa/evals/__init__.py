"""Evaluation suites: what a decoder reads, held against its references.  `python -m lqa eval SUITE ... --out DIR`."""
