"""Clusters of directions: k-means by cosine, the same for the same vectors in the same order.

Vectors have length 1. Each goes to the centre with the largest cosine; centres become the direction of the
sum of theirs; so on until nothing moves (Dhillon and Modha 2001). The first centres are vectors far from each
other: each is drawn with a chance that grows with one minus its largest cosine to the centres before it
(k-means++, the best of a few draws), from a sample of them. A centre that is left alone starts again at the
vector that fits its own centre worst.

Shape legend: D vectors, E dimensions, K centres.
"""

from __future__ import annotations

import math

import numpy as np

from gyrocompass.data.curate.encoders import Float32Array, unit_rows
from gyrocompass.data.curate.words import Int64Array

_ROWS_AT_ONCE = 4096
_SAMPLE_PER_CENTRE = 64


def centres(vector_DE: Float32Array, count: int, seed: int, rounds: int = 20) -> Float32Array:
    """So many directions that the vectors gather about: [K, E]; fewer where there are fewer vectors.

    Args:
        vector_DE: of length 1.
        count: K.
        seed: of the first centres.
        rounds: at most.
    """
    draw = np.random.default_rng(seed)
    centre_KE = _first(vector_DE, min(count, len(vector_DE)), draw)
    before_D = np.full(len(vector_DE), -1)
    for _ in range(rounds):
        place_D, cosine_D = nearest(vector_DE, centre_KE)
        if (place_D == before_D).all():
            break
        before_D = place_D
        sum_KE = np.zeros(centre_KE.shape, np.float64)
        np.add.at(sum_KE, place_D, vector_DE)
        empty_K = np.flatnonzero(np.bincount(place_D, minlength=len(centre_KE)) == 0)
        sum_KE[empty_K] = vector_DE[np.argsort(cosine_D, kind="stable")[: len(empty_K)]]
        centre_KE = unit_rows(sum_KE.astype(np.float32))
    return centre_KE


def nearest(vector_DE: Float32Array, centre_KE: Float32Array) -> tuple[Int64Array, Float32Array]:
    """The centre of each vector, the first of equal ones, and its cosine."""
    places, cosines = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(vector_DE), _ROWS_AT_ONCE):
        cosine_DK = vector_DE[start : start + _ROWS_AT_ONCE] @ centre_KE.T
        place_D = cosine_DK.argmax(axis=1)
        places.append(place_D)
        cosines.append(cosine_DK[np.arange(len(place_D)), place_D])
    return np.concatenate(places), np.concatenate(cosines)


def _first(vector_DE: Float32Array, count: int, draw: np.random.Generator) -> Float32Array:
    """Vectors far from each other."""
    sample = min(len(vector_DE), _SAMPLE_PER_CENTRE * count)
    chosen_DE = vector_DE[np.sort(draw.choice(len(vector_DE), sample, replace=False))]
    trials = 2 + int(math.log(max(count, 1)))
    picks: list[int] = []
    distance_D = np.ones(len(chosen_DE))
    for _ in range(count):
        running = np.cumsum(distance_D)
        drawn = np.searchsorted(running, draw.random(trials) * running[-1], side="right")
        drawn = np.minimum(drawn, len(chosen_DE) - 1)
        left_TD = np.minimum(distance_D, np.maximum(0, 1 - chosen_DE[drawn] @ chosen_DE.T))
        best = int(left_TD.sum(axis=1).argmin())
        picks.append(int(drawn[best]))
        distance_D = left_TD[best]
    return chosen_DE[picks]
