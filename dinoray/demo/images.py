"""The demo's pictures: those inside scikit-image, and their features."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from dinoray.config import ExtractImagesJob
from dinoray.extraction import extract_images
from dinoray.report.html import write_report

MODEL, WEIGHTS = "vits16", "random:0"


def show_images(folder: Path, *, no_ray: bool, say: Callable[[str], None]) -> None:
    """Features of the pictures, and their report, below `folder`."""
    say("-- the pictures inside scikit-image")
    pictures = Path(str(files("skimage"))) / "data"
    job = ExtractImagesJob(sources=(str(pictures),), out=str(folder / "features"), model=MODEL,
                           weights=WEIGHTS, features=("cls", "patch_mean", "patches"), unit_items=8, no_ray=no_ray,
                           pattern="none")
    outcome = extract_images(job, say)
    say(f"look at {write_report(outcome.out, str(folder / 'report.html'))}")
    say(f"the features: python -c \"import dinoray; print(dinoray.open_features('{outcome.out}').table().to_pandas())\"")
