"""Which labelled images a job trains on, and which it validates on."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from dinoray.config.labelled import LabelledSource
from dinoray.config.training import TrainDistanceMapJob
from dinoray.errors import BadRequest
from dinoray.io.annotations import LabelledImage, list_labelled
from dinoray.wording import plural


def labelled_sets(job: TrainDistanceMapJob) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(training images, validation images), listed anew, in a fixed order.

    Raises BadRequest for sources that cannot be listed, and when both sets hold the same files.
    """
    train = _listed(job.train)
    if job.validation:
        validation = _listed(job.validation)
        shared = {image.files[0].uri for image in train} & {image.files[0].uri for image in validation}
        if shared:
            raise BadRequest(f"{plural(len(shared), 'image')} stand in both train and validation, e.g. {min(shared)}",
                             where="validation", todo="choose them apart with `ids`, or leave validation out to have some set "
                             "aside")
        return train, validation
    if len(train) < 2:
        raise BadRequest("one labelled image cannot be both trained on and validated on", where="train",
                         todo="give more images, or `validation`")
    # by the hash of its id: the same images whatever else is listed beside them
    order = sorted(train, key=lambda image: hashlib.blake2b(f"{image.source}/{image.image_id}".encode()).digest())
    aside = {id(image) for image in order[:min(len(train) - 1, max(1, round(job.validation_fraction * len(train))))]}
    left = [image for image in train if id(image) not in aside]
    for source in sorted({image.source for image in train} - {image.source for image in left}):
        raise BadRequest(f"all images of source {source} ({job.train[source].images}) would be set aside for the validation",
                         where="validation_fraction", todo="give `validation` of your own, a smaller validation_fraction, or more "
                         "images of it")
    return left, [image for image in train if id(image) in aside]


def _listed(sources: tuple[LabelledSource, ...]) -> list[LabelledImage]:
    found = []
    for number, source in enumerate(sources):
        found += [replace(image, source=number) for image in list_labelled(source)]
    return found
