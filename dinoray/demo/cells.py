"""The demo's cells: a small model trained from nothing on drawn pictures, then used and measured on others."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from dinoray.config import SegmentCellsJob, TrainDistanceMapJob
from dinoray.config.augmentation import Augmentation
from dinoray.config.labelled import LabelledSource
from dinoray.demo.cell_pictures import SIDE_PX, write_cells
from dinoray.evaluation import evaluate_cells, write_evaluation
from dinoray.extraction import segment_cells
from dinoray.io.label_pairs import list_predictions, list_truth, pair_up
from dinoray.report.html import write_report
from dinoray.train import train_distance_map

KNOWN, UNSEEN = 24, 6
"""Pictures to learn from, and to be measured on."""
STEPS = 250
FLOOR = 0.5
"""Image-mean AP50 on the unseen pictures below which something is broken: it is far above it."""


def show_cells(folder: Path, *, say: Callable[[str], None]) -> bool:
    """Pictures, training, masks, scores and their pages, below `folder`. Whether the model finds the cells of pictures that it
    has not seen. Without Ray: the start of the workers would take longer than the work."""
    say(f"-- cells: {KNOWN} drawn pictures of {SIDE_PX} x {SIDE_PX} px to learn from, {UNSEEN} others to be measured on; "
        "in this process, without Ray")
    known, unseen = write_cells(folder / "known", KNOWN, seed=1000), write_cells(folder / "unseen", UNSEEN, seed=2000)
    trained = train_distance_map(training_job(known, folder / "training"), say)
    say(f"look at {write_report(trained.out, str(folder / 'training_report.html'))}")
    masks = segment_cells(SegmentCellsJob(sources=(str(unseen / "images"),), checkpoint=trained.checkpoint, device="cpu",
                                          out=str(folder / "masks"), no_ray=True), say)
    say(f"look at {write_report(masks.out, str(folder / 'masks_report.html'))}")
    return _measured(folder, masks.out, unseen, say)


def training_job(known: Path, out: Path) -> TrainDistanceMapJob:
    """A job small enough for a demo: everything from scratch, small crops, few steps, a high learning rate."""
    return TrainDistanceMapJob(
        train=(LabelledSource(images=str(known / "images"), labels=str(known / "labels")),), validation_fraction=0.2, out=str(out),
        model="vitt16", weights="random:0", backbone_learning_rate=5e-4, learning_rate=4e-3, decoder_channels=(64, 32, 16, 16),
        crop_px=64, batch_size=4, micro_batch=4, steps=STEPS, warmup_steps=min(15, STEPS - 1), beta2=0.99, foreground_weight=2,
        precision="float32", device="cpu", validate_every=125, checkpoint_every=125, no_ray=True,
        augmentation=Augmentation(p_invert=0, p_tone=0.2, p_rotate=0.2))


def _measured(folder: Path, masks: str, unseen: Path, say: Callable[[str], None]) -> bool:
    """Score the masks against the truth, say the figures and where to look."""
    truth = LabelledSource(images=str(unseen / "images"), labels=str(unseen / "labels"))
    pairs, _ = pair_up(list_predictions(masks), list_truth(truth))
    result = evaluate_cells(pairs, settings={"pred": masks, "truth": truth.labels, "images": truth.images})
    *_, page = write_evaluation(result, str(folder / "scores"))
    mean, pooled = (result.summary.metrics["AP@0.5"][pooling].value for pooling in ("image_mean", "pooled"))
    seg, det = (result.summary.metrics[name]["pooled"].value for name in ("SEG", "DET"))
    say(f"on the {UNSEEN} pictures that it has not seen: {result.summary.pred} cells found of {result.summary.truth} drawn; "
        f"AP50 {mean:.3f} (mean of the images; {pooled:.3f} pooled), SEG {seg:.3f}, DET {det:.3f}")
    say(f"look at {page}")
    say(f"a mask: python -c \"import dinoray; m = dinoray.open_masks('{masks}'); i = list(m)[0]; "
        "print(i, m[i].shape, m[i].dtype, m[i].max(), 'cells')\"")
    again = shlex.join(["dinoray", "evaluate", "cells", "--pred", masks, "--truth", truth.labels, "--images", truth.images])
    say(f"all the scores: {again}")
    if not mean >= FLOOR:
        say(f"demo FAILED: AP50 {mean:.3f} is below {FLOOR:g}: the model has not learned to find these cells, so something is "
            f"broken here. Look at {folder / 'training_report.html'}, and run the demo again with another --out")
    return mean >= FLOOR
