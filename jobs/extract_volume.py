"""Three-plane features of a volume: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/extract_volume.py jobs/configs/extract_volume.yaml out=s3://bucket/run

The same job as `dinoray extract volume --job FILE.yaml`; `key=value` overrides fields. Exit code 0 also with
quarantined slabs (their number stands in the last line), 3 with `strict=true`.
"""

import sys

from dinoray.cli import run_extract_volume, run_job_script
from dinoray.config import ExtractVolumeJob

if __name__ == "__main__":
    sys.exit(run_job_script(ExtractVolumeJob, run_extract_volume, sys.argv[1:]))
