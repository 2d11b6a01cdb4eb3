"""Features of single cells: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/extract_cells.py jobs/configs/extract_cells.yaml out=s3://bucket/run

The same job as `dinoray extract cells --job FILE.yaml`; `key=value` overrides fields. Exit code 0 also with
quarantined items (their number stands in the last line), 3 with `strict=true`.
"""

import sys

from dinoray.cli import run_extract_images, run_job_script
from dinoray.config import ExtractCellsJob

if __name__ == "__main__":
    sys.exit(run_job_script(ExtractCellsJob, run_extract_images, sys.argv[1:]))
