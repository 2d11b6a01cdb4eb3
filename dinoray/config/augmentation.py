"""How training samples are varied: crops of an image and its labels, turned, scaled, and changed in tone."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Factors = tuple[Positive, Positive]


class Augmentation(BaseModel):
    """Random changes of a training sample. A `p_...` is the share of samples that get a change.

    Pairs are (low, high) and drawn log-uniformly, so that halving is as likely as doubling. Intensities are those after
    scaling to [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    flips: bool = True
    """One of the 8 symmetries of the square (4 quarter turns, each mirrored or not), all equally likely."""
    p_rotate: Share = 0.5
    """Share turned by any angle, on top of a symmetry."""
    rotate_deg: float = Field(180.0, ge=0, le=180)
    """Largest angle in degrees, to either side."""
    p_scale: Share = 0.5
    """Share enlarged or shrunk. A sample that is neither turned nor scaled keeps its very pixels: images are segmented
    unblurred, so the network has to see some of them unblurred."""
    scale: Factors = (0.8, 1.25)
    """Factor of the objects' size in px."""
    p_foreground: Share = 0.5
    """Share of crops around a random pixel of an object (where there is one); the others lie anywhere."""
    p_tone: Share = 0.5
    """Share whose gamma, contrast and brightness are changed."""
    gamma: Factors = (0.7, 1.4)
    """Exponent of the intensities."""
    contrast: Factors = (0.75, 1.33)
    """Factor of the distance to the crop's mean."""
    brightness: float = Field(0.1, ge=0, le=1)
    """Largest value added or taken away, of a range of 1."""
    p_invert: Share = 0.0
    """Share of negatives. They are pictures that no microscope makes: a share of 0.1 made the validation loss of a short training
    a third larger (docs/cells-learning.md). Of use where training images have one polarity and yours the other."""
    p_blur: Share = 0.15
    """Share blurred, as if out of focus."""
    blur_sigma_px: Factors = (0.4, 1.2)
    """(low, high) sigma of the Gaussian in px of the crop."""
    p_noise: Share = 0.25
    """Share with Gaussian noise, independent for each pixel and channel (the same in the channels of a grey image)."""
    noise: float = Field(0.05, ge=0, le=1)
    """Largest standard deviation of the noise, of a range of 1."""
    p_colour: Share = 0.3
    """Share of colour images (channels that differ) whose channels get a gamma of their own: in transmitted light that is
    more or less of a stain, and white stays white."""
    colour_gamma: Factors = (0.75, 1.33)
    """Exponent of each channel's intensities."""
    p_channel_shuffle: Share = 0.05
    """Share of colour images whose channels change places."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("scale", "gamma", "contrast", "blur_sigma_px", "colour_gamma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; give (low, high)")
        return self

    @classmethod
    def off(cls) -> Self:
        """Crops at random places and nothing else."""
        return cls(flips=False, p_rotate=0, p_scale=0, p_foreground=0, p_tone=0, p_invert=0, p_blur=0, p_noise=0, p_colour=0,
                   p_channel_shuffle=0)
