"""Cell instances of a collection of images: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/segment_cells.py jobs/configs/segment_cells.yaml out=s3://bucket/run

The same job as `dinoray segment cells --job FILE.yaml`; `key=value` overrides fields. Exit code 0 also with
quarantined items (their number stands in the last line), 3 with `strict=true`.
"""

import sys

from dinoray.cli import run_job_script, run_segment_cells
from dinoray.config import SegmentCellsJob

if __name__ == "__main__":
    sys.exit(run_job_script(SegmentCellsJob, run_segment_cells, sys.argv[1:]))
