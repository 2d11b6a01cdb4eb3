"""Job models: what a user asks for, validated before anything runs.

Every field has its docstring; units stand in the names. A field changes results unless it is listed in
`EXECUTION_FIELDS`: the job fingerprint hashes all the others, so a new field is safe by default.
"""

from dinoray.config.base import EXECUTION_FIELDS, FeatureJob, UnitJob
from dinoray.config.building import build_job, canonical_json, read_job_file, recorded_job, recorded_model
from dinoray.config.fusion import TrainContextFusionJob
from dinoray.config.images import CollectionJob, ExtractCellsJob, ExtractImagesJob, ExtractJob, channel_groups
from dinoray.config.secrets import secret_in_url, without_secrets
from dinoray.config.segmentation import SegmentCellsJob
from dinoray.config.training import TrainDistanceMapJob, TrainingJob
from dinoray.config.volume_segmentation import SegmentVolumeJob
from dinoray.config.volumes import ExtractVolumeJob

__all__ = ["EXECUTION_FIELDS", "CollectionJob", "ExtractCellsJob", "ExtractImagesJob", "ExtractJob", "ExtractVolumeJob",
           "FeatureJob", "SegmentCellsJob", "SegmentVolumeJob", "TrainContextFusionJob", "TrainDistanceMapJob", "TrainingJob",
           "UnitJob", "build_job", "canonical_json", "channel_groups", "read_job_file", "recorded_job", "recorded_model",
           "secret_in_url", "without_secrets"]
