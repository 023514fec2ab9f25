"""Seeds: every draw of a run follows from its one seed."""

import numpy as np


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
