"""Mean feature of each cell: patch tokens averaged with the area that the cell covers of each token's footprint."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from dinoray.errors import BadRequest
from dinoray.vision.resampling2d import scaled_shape

PIXELS_AT_ONCE = 1 << 22
"""Pixels of a label image whose overlaps with tokens are listed at once: bounds the memory to a few 100 MB."""


def overlaps(pixels: int, resampled: int, tokens: int, patch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How the pixels of an axis lie on its tokens: pairs (token int32 [pixels], share float32 [pixels]); the shares of a
    pixel add up to 1.

    The axis of `pixels` px was resampled to `resampled` px, of which every token takes `patch`.
    """
    edges = np.arange(pixels + 1) * (resampled / (pixels * patch))  # of the pixels, in tokens
    begin, end = edges[:-1], edges[1:]
    first = np.floor(begin + 1e-9).astype(np.int32)
    pairs, step = [], 0
    while True:
        token = first + step
        share = np.minimum(end, token + 1) - np.maximum(begin, token)
        if step and not (share > 1e-9).any():
            return pairs
        pairs.append((np.minimum(token, tokens - 1), (np.maximum(share, 0) / (end - begin)).astype(np.float32)))
        step += 1


def mean_tokens(tokens: np.ndarray, labels: np.ndarray, patch: int, scale: float, ids: np.ndarray) -> np.ndarray:
    """Area-weighted mean float32 [n, D] over each of the cells `ids` [n] of a label image int [Y, X].

    `tokens` float32 [D, h, w] are of the image at `scale` times the labels' resolution, `patch` px of that image each. A
    token weighs as much as the cell covers of its footprint; a cell within one footprint gets that token. Raises
    BadRequest when an id is not in the label image, or the tokens are not of an image of that size.
    """
    dim, h, w = tokens.shape
    resampled = scaled_shape(labels.shape, scale)
    if (h, w) != tuple(-(-side // patch) for side in resampled):
        raise BadRequest(f"{h} x {w} tokens of {patch} px for an image of {resampled[0]} x {resampled[1]} px",
                         todo="give the tokens and the scale of the same image")
    ids = np.asarray(ids, np.int64)
    order = np.argsort(ids, kind="stable")
    down, across = (overlaps(labels.shape[axis], resampled[axis], (h, w)[axis], patch) for axis in (0, 1))
    weights = sparse.csr_array((len(ids), h * w), dtype=np.float32)
    rows = max(1, PIXELS_AT_ONCE // labels.shape[1])
    for start in range(0, labels.shape[0], rows) if len(ids) else ():
        y, x = np.nonzero(labels[start:start + rows])
        y += start
        found = labels[y, x].astype(np.int64)
        place = np.minimum(np.searchsorted(ids, found, sorter=order), len(ids) - 1)
        cell = order[place]
        wanted = ids[cell] == found
        y, x, cell = y[wanted], x[wanted], cell[wanted]
        for token_y, share_y in down:
            for token_x, share_x in across:
                share = share_y[y] * share_x[x]
                on = share > 0
                at = (cell[on].astype(np.int32), token_y[y[on]] * np.int32(w) + token_x[x[on]])
                weights += sparse.coo_array((share[on], at), shape=weights.shape).tocsr()
    area = weights.sum(axis=1)
    if not area.all():
        raise BadRequest(f"{np.count_nonzero(area == 0)} of {len(ids)} ids are not in the label image",
                         todo="give the ids of this label image")
    means = weights @ np.ascontiguousarray(tokens.reshape(dim, h * w).T, np.float32)
    return (means / area[:, None]).astype(np.float32)
