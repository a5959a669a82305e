"""Clusters: what is joined by pairs, found by union and find over whole arrays.

    pairs --roots--> the smallest member of each document's cluster

Documents are numbered in the order of survival, so the smallest member is the one that stays. Each round
hangs the root of the larger number under that of the smaller, for all pairs at once, then lets every document
point to its root; rounds end when no pair joins two roots. The result is that of connected components: it
depends neither on the order of pairs nor on the number of rounds.

Shape legend: D documents, P pairs.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.words import Int64Array


def roots(root_D: Int64Array, left_P: Int64Array, right_P: Int64Array) -> Int64Array:
    """The smallest document that each is joined with, directly or through others: [D].

    Args:
        root_D: the same before these pairs; `arange(D)` before any.
        left_P: documents.
        right_P: the other one of each pair.

    >>> roots(np.arange(6), np.array([4, 1, 5]), np.array([2, 4, 3])).tolist()
    [0, 1, 1, 3, 1, 3]
    """
    root_D = root_D.copy()
    while True:
        left_P, right_P = root_D[left_P], root_D[right_P]
        apart = left_P != right_P
        if not apart.any():
            return root_D
        left_P, right_P = left_P[apart], right_P[apart]
        np.minimum.at(root_D, np.maximum(left_P, right_P), np.minimum(left_P, right_P))
        above_D = root_D[root_D]
        while (above_D != root_D).any():
            root_D = above_D
            above_D = root_D[root_D]


def first_of_equal(key_D: np.ndarray, *more: np.ndarray) -> Int64Array:
    """The smallest document with the same keys as each: [D].

    >>> first_of_equal(np.array([7, 5, 7, 5]), np.array([1, 1, 1, 2])).tolist()
    [0, 1, 0, 3]
    """
    order = np.lexsort((*more, key_D))  # stable: within equal keys the smallest document is first
    fresh = np.ones(len(order), np.bool_)
    if len(order):
        fresh[1:] = False
        for key in (key_D, *more):
            fresh[1:] |= key[order[1:]] != key[order[:-1]]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]] if len(order) else order
    return first


def cluster_names(ids: pa.Array, root_D: Int64Array) -> pa.Array:
    """The smallest id of each document's cluster, null where it is alone: [D].

    >>> cluster_names(pa.array(["b", "c", "a"]), np.array([0, 1, 0])).to_pylist()
    ['a', None, 'a']
    """
    by_id = numbers(pc.sort_indices(ids)).astype(np.int64)
    place_D = np.empty(len(by_id), np.int64)
    place_D[by_id] = np.arange(len(by_id))
    smallest_D = place_D.copy()
    np.minimum.at(smallest_D, root_D, place_D)
    alone_D = np.bincount(root_D, minlength=len(root_D))[root_D] == 1
    return ids.take(column(by_id[smallest_D[root_D]], alone_D))
