"""A context-fusion UNet of volumes: what `ray job submit` runs.

    ray job submit --working-dir . -- python jobs/train_context_fusion.py jobs/configs/train_context_fusion.yaml out=s3://bucket/run

The same job as `dinoray train context-fusion FILE.yaml`; `key=value` overrides fields.
"""

import sys

from dinoray.cli.train import run_training_script
from dinoray.config import TrainContextFusionJob

if __name__ == "__main__":
    sys.exit(run_training_script(TrainContextFusionJob, sys.argv[1:]))
