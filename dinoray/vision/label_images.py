"""What a label image is here, checked in one place: [Y, X], an integer dtype, 0 = background, no negative ids."""

from __future__ import annotations

import numpy as np

from dinoray.errors import BadRequest


def checked(labels: np.ndarray) -> np.ndarray:
    """`labels` as a contiguous array [Y, X] of a native integer dtype (a copy only where that needs one).

    Raises BadRequest for another number of axes, a dtype that is not an integer, and negative ids.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise BadRequest(f"a label image has two axes, not {labels.ndim} (shape {labels.shape})",
                         todo="an RGB picture of labels holds colours, not ids: save the ids as an integer TIFF or PNG")
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadRequest(f"a label image has integer ids, not {labels.dtype}", todo="convert it to uint16 or int32 first")
    if np.issubdtype(labels.dtype, np.signedinteger) and labels.size and labels.min() < 0:
        raise BadRequest(f"the label image has a negative id ({labels.min()})", todo="background is 0, objects are 1 and above")
    return np.ascontiguousarray(labels, dtype=labels.dtype.newbyteorder("="))
