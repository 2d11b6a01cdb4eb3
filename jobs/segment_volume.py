"""Classes or instances of the voxels of a volume: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/segment_volume.py jobs/configs/segment_volume.yaml out=s3://bucket/run

The same job as `dinoray segment volume --job FILE.yaml`; `key=value` overrides fields. Exit code 0 also with quarantined blocks
(their number stands in the last line), 3 with `strict=true`.
"""

import sys

from dinoray.cli import run_job_script, run_segment_volume
from dinoray.config import SegmentVolumeJob

if __name__ == "__main__":
    sys.exit(run_job_script(SegmentVolumeJob, run_segment_volume, sys.argv[1:]))
