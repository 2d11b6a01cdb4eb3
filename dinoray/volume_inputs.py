"""From a job to the volume (and the mask) that it reads; nothing but metadata is read here."""

from __future__ import annotations

from dinoray.config import ExtractVolumeJob
from dinoray.errors import BadRequest
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


def open_mask(job: ExtractVolumeJob) -> Volume | None:
    """The mask of a job whose `foreground` is one; its voxels may have another size than the volume's.

    Raises BadRequest, TransientError, SystemicError.
    """
    source = job.mask_source()
    if source is None:
        return None
    try:
        return open_volume(VolumeRequest(source, mask=True))
    except BadRequest as error:
        raise BadRequest(f"the mask cannot be used: {error.what}", where=error.where or source,
                         todo="give a mask with its voxel size (OME-Zarr, say; it may be coarser than the volume): integers or "
                         "booleans, 0 is background") from error


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
