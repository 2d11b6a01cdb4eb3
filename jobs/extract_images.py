"""Features of an image collection: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/extract_images.py jobs/configs/extract_images.yaml out=s3://bucket/run

The same job as `dinoray extract images --job FILE.yaml`; `key=value` overrides fields. Exit code 0 also with
quarantined items (their number stands in the last line), 3 with `strict=true`.
"""

import sys

from dinoray.cli import run_extract_images, run_job_script
from dinoray.config import ExtractImagesJob

if __name__ == "__main__":
    sys.exit(run_job_script(ExtractImagesJob, run_extract_images, sys.argv[1:]))
