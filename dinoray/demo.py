"""`dinoray demo`: the main job on pictures that are on this machine already, offline, with a report to look at."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from dinoray.config import ExtractImagesJob
from dinoray.extraction import extract_images
from dinoray.report.html import write_report

MODEL, WEIGHTS = "vits16", "random:0"


def run_demo(out: str, *, no_ray: bool, say: Callable[[str], None]) -> int:
    """Extract, verify, report; prints where to look. Run again: it resumes. Returns 0 (quarantine is no failure)."""
    pictures = Path(str(files("skimage"))) / "data"
    say("demo: DINOv3 features of the pictures inside scikit-image, offline. "
        "Random weights: texture only, no meaning.")
    job = ExtractImagesJob(sources=(str(pictures),), out=str(Path(out).absolute() / "features"), model=MODEL,
                           weights=WEIGHTS, features=("cls", "patch_mean", "patches"), unit_items=8, no_ray=no_ray,
                           pattern="none")
    outcome = extract_images(job, say)
    page = write_report(outcome.out, str(Path(out).absolute() / "report.html"))
    say(f"look at {page}")
    say(f"the features: python -c \"import dinoray; print(dinoray.open_features('{outcome.out}').table().to_pandas())\"")
    return 0
