"""From a job to the volume (and the mask) that it reads; nothing but metadata is read here."""

from __future__ import annotations

import contextlib

from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest, MissingScale
from dinoray.io.volumes import Volume, VolumeRequest, open_volume


def volume_request(job: ExtractVolumeJob) -> VolumeRequest:
    """How the job's volume is opened, in any process."""
    raw = job.raw_voxel_size
    return VolumeRequest(job.sources[0], raw_voxel_nm=None if raw is None else raw[0] if len(raw) == 1 else raw,  # type: ignore[arg-type]
                         dataset=job.dataset, time=job.time, crop=job.crop_box(),  # type: ignore[arg-type]
                         channel=int(job.channel) if (job.channel or "").isdigit() else job.channel)


def open_source(job: ExtractVolumeJob) -> Volume:
    """The volume of a job. Raises BadRequest, TransientError, SystemicError."""
    return open_volume(volume_request(job))


def open_mask(job: ExtractVolumeJob, volume: Volume | None = None) -> Volume | None:
    """The mask of a job whose `foreground` is one; its voxels may have another size than the volume's. One that states no
    voxel size lies on `volume` (opened here if it is not given) voxel by voxel, which its notes say.

    Raises BadRequest, TransientError, SystemicError.
    """
    source = job.mask_source()
    if source is None:
        return None
    try:
        return open_volume(VolumeRequest(source, mask=True))
    except MissingScale as error:
        return _unscaled_mask(job, source, volume, error)
    except BadRequest as error:
        raise BadRequest(f"--foreground is neither a number nor a mask volume that can be read: {error.what}",
                         where=error.where or source, todo="give a number, or the path of a mask: integers or booleans, 0 is "
                         "background, with its voxel size (OME-Zarr, say; it may be coarser than the volume) or of the volume's "
                         "shape") from error


def _unscaled_mask(job: ExtractVolumeJob, source: str, volume: Volume | None, error: MissingScale) -> Volume:
    with open_source(job) if volume is None else contextlib.nullcontext(volume) as under:
        mask = open_volume(VolumeRequest(source, mask=True, raw_voxel_nm=under.voxel_size_nm))
        if mask.lie_on(under):
            mask.notes = (f"{error.what}: it has as many voxels as the volume, and is taken to lie on it voxel by voxel",)
            return mask
        mask.close()
        raise BadRequest(f"the mask cannot be placed: {error.what}, and it has {_size(mask)} voxels, the volume {_size(under)}",
                         where=error.where, todo="give a mask that states its voxel size (OME-Zarr, say; it may be coarser than "
                         "the volume), or one of the volume's shape") from error


def _size(volume: Volume) -> str:
    return " x ".join(map(str, volume.shape))


def threshold(job: ExtractVolumeJob) -> float | None:
    """The value above which voxels are foreground, when `foreground` is a number."""
    return None if job.foreground is None or job.mask_source() is not None else float(job.foreground)


def check_mask(volume: Volume, mask: Volume) -> None:
    """Raises BadRequest when the mask does not cover the volume (to half a voxel of the mask)."""
    for axis, name in enumerate("zyx"):
        low, high = edges(volume, axis)
        mask_low, mask_high = edges(mask, axis)
        slack = mask.voxel_size_nm[axis] / 2
        if mask_low - slack > low or mask_high + slack < high:
            raise BadRequest(f"the mask reaches from {mask_low:g} to {mask_high:g} nm along {name}, the volume from {low:g} "
                             f"to {high:g} nm", where=mask.ref.uri, todo="give a mask of the whole volume, or --crop the volume")


def edges(volume: Volume, axis: int) -> tuple[float, float]:
    """Where the volume begins and ends along an axis, in nm of the world."""
    size = volume.voxel_size_nm[axis]
    low = volume.translation_nm[axis] - size / 2
    return low, low + volume.shape[axis] * size
