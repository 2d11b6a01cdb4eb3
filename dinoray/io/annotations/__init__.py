"""Images with a mask for each object, from the layouts in which people keep them (docs/training-data.md).

`list_labelled` reads names only (and the JSON of a COCO set); `LabelledImage.read` reads pixels. Every layout ends in
the same thing: one image_CYX and one label image [Y, X] of int32.
"""

from dinoray.io.annotations.labelled import LabelledImage, digest, sample_weights
from dinoray.io.annotations.listing import list_labelled

__all__ = ["LabelledImage", "digest", "list_labelled", "sample_weights"]
