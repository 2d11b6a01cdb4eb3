"""A distance-map UNet of cells: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/train_distance_map.py jobs/configs/train_distance_map.yaml out=s3://bucket/run

The same job as `dinoray train distance-map FILE.yaml`; `key=value` overrides fields.
"""

import sys

from dinoray.cli.train import run_training_script
from dinoray.config import TrainDistanceMapJob

if __name__ == "__main__":
    sys.exit(run_training_script(TrainDistanceMapJob, sys.argv[1:]))
