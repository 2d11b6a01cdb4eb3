"""Random training samples: a crop of an image and its labels, turned, scaled and changed in tone (config/augmentation.py).

Everything random comes from one generator that the caller keys by the sample's number, so a resumed run or another
number of workers sees the same samples. How many numbers are drawn never depends on what they are or on the settings:
changing one option leaves the others' choices as they were. The choices are the same on every machine, the pixels to
float32 rounding. Distance maps are made from the labels that come out.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from dinoray.config.augmentation import Augmentation
from dinoray.errors import BadRequest
from dinoray.training.warping import Warp, check_pair, grid_crops, instances, plain_crop, warp, without_copies

__all__ = ["augment", "draw_warp", "grid_crops", "plain_crop"]

_NAMES = ("symmetry", "p_rotate", "angle", "p_scale", "scale", "y", "x", "p_foreground", "foreground",
          "p_tone", "gamma", "contrast", "brightness", "p_invert", "p_blur", "blur", "p_noise", "noise",
          "p_colour", "colour0", "colour1", "colour2", "p_shuffle", "shuffle")
"""One uniform number each, in this order; a new one goes to the end (then noise and candidates change, nothing else)."""
_CANDIDATES = 256
"""Places tried for a labelled pixel before all labels are looked through."""
_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
MAX_ZOOM = 64.0
"""Zooms beyond this (or below its inverse) come from wrong pixel sizes, and would read a whole plate for one crop."""


def augment(image: np.ndarray, labels: np.ndarray, crop_px: int, config: Augmentation, rng: np.random.Generator, *,
            zoom: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A random crop: (float32 [3, crop_px, crop_px] in [0, 1], int32 labels [crop_px, crop_px], see `warping.instances`).

    `image` float [3, Y, X] in [0, 1]; `labels` [Y, X] of any whole-number type, 0 = background. `zoom`: px of the model's
    scale for each px of this image (its pixel size over the model's, or the model's diameter over its diameter); it
    becomes part of the one resampling. Images smaller than the crop are mirrored. Cost grows with the crop, not with
    the image, save that an image hardly any of which is labelled is looked through for a labelled pixel.

    Raises BadRequest when image and labels do not fit each other, or for a zoom that cannot be meant.
    """
    check_pair(image, labels, crop_px)
    if not 1 / MAX_ZOOM <= zoom <= MAX_ZOOM:
        raise BadRequest(f"a zoom of {zoom:g} to the model's scale", todo="check the pixel sizes and diameters (µm, px)")
    drawn = dict(zip(_NAMES, (float(v) for v in rng.random(len(_NAMES))), strict=True))
    noise_seed = int(rng.integers(2**63))
    candidates = rng.random((_CANDIDATES, 2))
    crop, ids = warp(image, labels, draw_warp(labels, crop_px, config, drawn, candidates, zoom), crop_px)
    return _toned(crop, config, drawn, noise_seed), instances(ids)


def draw_warp(labels: np.ndarray, crop_px: int, config: Augmentation, drawn: dict[str, float], candidates: np.ndarray,
              zoom: float) -> Warp:
    """The geometry of a sample from its uniform numbers.

    The crop's centre is uniform over the places where the crop (turned: the circle in it, nearly) stays inside the image,
    or that place nearest to a random labelled pixel, which then lies in the crop however it is turned.
    """
    angle = (2 * drawn["angle"] - 1) * config.rotate_deg if drawn["p_rotate"] < config.p_rotate else 0.0
    factor = _between(config.scale, drawn["scale"]) if drawn["p_scale"] < config.p_scale else 1.0
    scale = zoom * factor
    reach = crop_px / 2 / scale
    if angle:
        reach /= math.sqrt(2)
    low, high = zip(*(sorted((reach, side - reach)) for side in labels.shape), strict=True)
    centre = [low[i] + drawn[name] * (high[i] - low[i]) for i, name in enumerate("yx")]
    if drawn["p_foreground"] < config.p_foreground:
        pixel = _labelled_pixel(labels, candidates, drawn["foreground"])
        if pixel is not None:
            centre = [min(max(at + 0.5, low[i]), high[i]) for i, at in enumerate(pixel)]
    symmetry = int(drawn["symmetry"] * 8) if config.flips else 0
    return Warp(centre[0], centre[1], symmetry, angle, scale)


def _labelled_pixel(labels: np.ndarray, candidates: np.ndarray, chosen: float) -> tuple[int, int] | None:
    """A pixel uniform among the labelled ones, None where there is none."""
    places = (candidates * labels.shape).astype(np.intp)
    hits = np.flatnonzero(labels[places[:, 0], places[:, 1]])
    if len(hits):
        return tuple(int(v) for v in places[hits[0]])
    labelled = np.flatnonzero(labels)
    if not len(labelled):
        return None
    y, x = divmod(int(labelled[int(chosen * len(labelled))]), labels.shape[1])
    return y, x


def _between(factors: tuple[float, float], drawn: float) -> float:
    low, high = factors
    return low * (high / low) ** drawn


def _toned(crop: np.ndarray, config: Augmentation, drawn: dict[str, float], noise_seed: int) -> np.ndarray:
    """The crop [C, n, n] with another focus, colour, tone and noise, in [0, 1]; a grey one (equal channels) stays grey."""
    count = len(crop)
    planes = without_copies(crop)
    if drawn["p_shuffle"] < config.p_channel_shuffle and len(planes) == 3:
        planes = planes[list(_ORDERS[int(drawn["shuffle"] * len(_ORDERS))])]
    if drawn["p_blur"] < config.p_blur:
        sigma = _between(config.blur_sigma_px, drawn["blur"])
        planes = ndimage.gaussian_filter(planes, (0, sigma, sigma), mode="reflect")
    planes = np.clip(planes, 0.0, 1.0)  # also a copy: what follows works in place
    toned = drawn["p_tone"] < config.p_tone
    exponents = np.full(len(planes), _between(config.gamma, drawn["gamma"]) if toned else 1.0)
    if drawn["p_colour"] < config.p_colour and len(planes) == 3:
        exponents *= [_between(config.colour_gamma, drawn[f"colour{k}"]) for k in range(3)]
    for plane, exponent in zip(planes, exponents, strict=True):
        if exponent != 1:
            np.power(plane, np.float32(exponent), out=plane)
    if toned:
        mean = np.float32(planes.mean(dtype=np.float64))
        planes -= mean
        planes *= np.float32(_between(config.contrast, drawn["contrast"]))
        planes += mean + np.float32((2 * drawn["brightness"] - 1) * config.brightness)
        np.clip(planes, 0.0, 1.0, out=planes)
    if drawn["p_invert"] < config.p_invert:
        np.subtract(np.float32(1), planes, out=planes)
    if drawn["p_noise"] < config.p_noise:
        noise = np.random.default_rng(noise_seed).standard_normal(planes.shape, dtype=np.float32)
        noise *= np.float32(drawn["noise"] * config.noise)
        planes += noise
        np.clip(planes, 0.0, 1.0, out=planes)
    return planes if len(planes) == count else np.repeat(planes, count, axis=0)
