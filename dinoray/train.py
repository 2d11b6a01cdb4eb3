"""The life of a training job, from its sources to the checkpoint folder."""
