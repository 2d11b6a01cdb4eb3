"""What a training says of itself while it runs: TensorBoard, history.json, and progress.json for whoever watches."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoray.io.stores import LocalStore, Store
from dinoray.training.board import Board
from dinoray.training.standing import PROGRESS_KEY, read_progress

if TYPE_CHECKING:
    from dinoray.training.loop import Progress

HISTORY_KEY, BOARD = "history.json", "tensorboard"
PROGRESS_EVERY_S = 3.0
_TAGS = {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "samples_per_s": "speed/samples_per_s",
         "wait_share": "speed/wait_share", "extraction_share": "speed/extraction_share"}


class Journal:
    """Written by the first worker only."""

    def __init__(self, store: Store, progress: Progress, steps: int, workers: int, run: str = ""):
        """`run` names the driver's run, so that a watcher can tell this one's figures from an earlier one's."""
        self.store, self.steps, self.workers, self.run = store, steps, workers, run
        before = read_progress(store)
        self.starts = before.get("starts", 1) + 1 if run and before.get("run") == run else 1
        """How often the workers of this run began, with this time."""
        self.began = progress.step
        """The step that they went on from."""
        self.facts: dict[str, Any] = {}
        """What the first worker found out about itself."""
        self._told = time.monotonic()
        self._temporary = None if isinstance(store, LocalStore) else tempfile.TemporaryDirectory(prefix="dinoray-board-")
        self.folder = Path(store.root) / BOARD if isinstance(store, LocalStore) else Path(self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._board = Board(self.folder, progress.step + 1)
        self.store.put(PROGRESS_KEY, json.dumps(self._now(progress)).encode())

    def add(self, row: dict[str, float], progress: Progress) -> None:
        """A row of the history, just appended to it."""
        step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._board.add(_TAGS.get(name, name.replace("val_", "validation/", 1)), value, step)
        if time.monotonic() - self._told >= PROGRESS_EVERY_S or step >= self.steps:
            self._told = time.monotonic()
            self.store.put(PROGRESS_KEY, json.dumps(self._now(progress)).encode())

    def note(self, facts: dict[str, Any], progress: Progress) -> None:
        """Tell a fact of this process."""
        self.facts |= facts
        self.store.put(PROGRESS_KEY, json.dumps(self._now(progress)).encode())

    def keep(self) -> None:
        """Make the board durable; called before each saved state."""
        self._board.flush()
        if self._temporary is not None:
            for file in sorted(self.folder.iterdir()):
                self.store.put(f"{BOARD}/{file.name}", file.read_bytes())

    def store_now(self, progress: Progress) -> None:
        """Tell where the training stands; called after each saved state."""
        self.store.put(HISTORY_KEY, json.dumps(progress.history).encode())
        self.store.put(PROGRESS_KEY, json.dumps(self._now(progress)).encode())

    def _now(self, progress: Progress) -> dict[str, Any]:
        """The last figures of each kind."""
        figures: dict[str, Any] = {}
        for row in progress.history[-200:]:
            figures |= row
        return self.facts | figures | {"step": progress.step, "steps": self.steps, "seconds": round(progress.seconds, 1),
                          "best_loss": progress.best_loss if progress.best_step else None, "best_step": progress.best_step,
                          "ended": progress.ended, "workers": self.workers, "micro_batch": progress.micro_batch,
                          "run": self.run, "starts": self.starts, "began": self.began}

    def close(self) -> None:
        """Flush and close the board."""
        self._board.close()
        if self._temporary is not None:
            self._temporary.cleanup()
