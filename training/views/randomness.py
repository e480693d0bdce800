"""Numbers that depend on a seed and a counter alone."""

import numpy as np

# streams of the counter-based generator, so that order, masks and views never share numbers
VIEWS_STREAM, ORDER_STREAM, MASK_STREAM, KIND_STREAM = 0, 1, 2, 3


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """numpy's Philox keyed by (seed, stream, counter): the same numbers in any process, worker or run."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 56) + counter]))
