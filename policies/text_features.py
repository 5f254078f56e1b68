"""An instruction as numbers without a vocabulary: hashed words, pairs of words and letter triples.

A word that training never saw still shares triples with those it did ("drawers" with "drawer"); nothing is downloaded.
"""

from __future__ import annotations

import itertools
import re
import zlib

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+")


def hashed_bag(text: str, num_buckets: int) -> npt.NDArray[np.float32]:
    """(num_buckets,) float32 of length 1, all zero for a text without a word. Case and punctuation do not count."""
    words = _WORD.findall(text.casefold())
    features = [f"1 {word}" for word in words]
    features += [f"2 {first} {second}" for first, second in itertools.pairwise(words)]
    for word in words:
        padded = f"<{word}>"
        features += [f"3 {padded[i : i + 3]}" for i in range(len(padded) - 2)]
    bag = np.zeros(num_buckets, dtype=np.float32)
    for feature in features:
        # A second hash gives the sign, so that what collides cancels on average (Weinberger et al. 2009).
        code = zlib.crc32(feature.encode())
        bag[code % num_buckets] += 1.0 if zlib.adler32(feature.encode()) & 1 else -1.0
    length = float(np.linalg.norm(bag))
    return bag / length if length else bag
