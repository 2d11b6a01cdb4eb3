"""Which weights a training asks for: the official ones of `model` where it names none, by the mirror where that is accepted."""

from __future__ import annotations

import pytest

from dinoray.config import TrainDistanceMapJob
from dinoray.training import distance_worker
from dinoray.training.spec import TrainingSpec
from tests.runs import tiny_backbone
from tests.vision.distance_models import FOUR


@pytest.mark.parametrize("accepted", [False, True])
def test_a_model_alone_means_its_official_weights(accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load(model, weights=None, *, accept_license=False, expect_digest=None):
        asked.append((model, weights, accept_license, expect_digest))
        return tiny_backbone(FOUR)

    monkeypatch.setattr(distance_worker, "load_backbone", load)
    job = TrainDistanceMapJob(train=[{"images": "images"}], out="out", model="vits16", accept_dinov3_license=accepted)
    distance_worker.build_model(job, TrainingSpec(job.kind, job.out, ""))
    # None, not "": an empty path would be the folder that the command runs in
    assert asked == [("vits16", None, accepted, None)]
