"""The generator behind every random decision, against known answers."""

import pytest
import torch

from mtfast.ops._philox import philox

ONES = 0xFFFFFFFF


# Random123's kat_vectors, philox4x32 with 7 rounds: counter, key, words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ONES,) * 4, (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, words):
    found = philox(*map(torch.tensor, counter), seed=key[0] | key[1] << 32)
    assert tuple(map(int, found)) == words
