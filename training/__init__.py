"""Learning: pretraining, probes and benchmarks, run from a checkout with `python -m training.…`."""
