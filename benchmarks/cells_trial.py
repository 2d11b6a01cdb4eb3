"""A few minutes of the learning benchmark, to compare settings: the loss on the validation crops after a short training.

    python -m benchmarks.cells_trial --out runs/trial-group norm=group
    python -m benchmarks.cells_trial --out runs/trial-layer norm=layer

The images, model and samples of benchmarks/cells_learning.py, 300 steps of 8 crops of 128 px on a cosine, no running mean;
`key=value` are fields of the job. `--ap` scores the validation images too, with the best thresholds for them. Nothing of the
test images is looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cells_learning import ROOT, Bench, ranked_settings
from benchmarks.common import hardware
from dinoray.io.stores import open_store
from dinoray.training.loop import fit
from dinoray.training.workers import Workers

SHORT = ["crop_px=128", "batch_size=8", "micro_batch=4", "steps=300", "warmup_steps=30", "validate_every=300",
         "checkpoint_every=1000", "log_every=50", "ema_decay=0", "validation_crops=128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ap", action="store_true", help="AP50 of the validation images too")
    parser.add_argument("overrides", nargs="*", help="key=value of the job")
    given = parser.parse_args()
    bench = Bench(given.out, 0.0, ROOT / "benchmarks/cells_learning.yaml", [*SHORT, *given.overrides])
    rows = fit(bench.job, bench.task(bench.models()["ours"], "ours"), Workers(), open_store(bench.job.out)).history
    print(hardware())
    print(" ".join(given.overrides), f"validation loss {rows[-1]['val_loss']:.4f}",
          f"samples/s {max(row['samples_per_s'] for row in rows if 'samples_per_s' in row):.1f}")
    if given.ap:
        pool = bench.validation.pool
        maps = bench.maps("ours", bench.trained("ours", "ours"), "validation", pool)
        for settings, best in ranked_settings(maps, [pool.read(i).labels for i in range(len(pool))]):
            print(f"validation AP50 {best.image_mean:.3f}, SEG {best.seg:.3f} image-mean with {settings}")


if __name__ == "__main__":
    main()
