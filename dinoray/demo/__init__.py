"""`dinoray demo`: the main jobs, offline, on what is on this machine already: pictures, and a small volume and images of cells
that are made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dinoray.demo.cells import show_cells
from dinoray.demo.images import show_images
from dinoray.demo.volume import show_volume


def run_demo(out: str, *, no_ray: bool, say: Callable[[str], None]) -> int:
    """Features of pictures and of a volume; a model of cells trained, used and measured; reports; prints where to look. Run
    again: it resumes. Returns 0 (quarantine is no failure), or 1 when the trained model does not find the cells."""
    folder = Path(out).absolute()
    say("demo: DINOv3 features of pictures and of a volume, then cells as instances, offline. The features are of random "
        "weights: texture only, no meaning.")
    show_images(folder, no_ray=no_ray, say=say)
    show_volume(folder, no_ray=no_ray, say=say)
    return 0 if show_cells(folder / "cells", say=say) else 1
