"""The kill test: a clean run, runs of the same job killed at seeded moments and resumed, and the comparison.

Everything runs through the real command line in processes of its own. Equal means: the same data objects,
byte for byte; every checksum, row and item accounted for (`verify --deep`); no scratch file left; no unit
started again that had its receipt.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dinoray.chaos.kills import Kill, draw_kills
from dinoray.chaos.pictures import make_pictures
from dinoray.chaos.striking import Start, start_and_strike
from dinoray.errors import BadRequest, DinorayError
from dinoray.io.stores import LocalStore
from dinoray.units import Plan
from dinoray.verification import DATA_FOLDERS, verify_deep
from dinoray.wording import plural

COMPLETE = (0, 3)
"""Exit codes of a run that is complete, without and with quarantined items."""
FEATURES = "cls,patch_mean,patches"
MISSED_IN_A_ROW = 3
"""A kill that found no moment on so many fresh outputs in a row ends the test: the job is too short for it."""


@dataclass(frozen=True)
class ChaosSettings:
    """What `dinoray chaos` is asked for."""

    kills: int = 20
    seed: int = 0
    out: str | None = None
    """Folder for all outputs, new or empty; a temporary one without it."""
    model: str = "vitt16"
    """Variant; weights are random: the test is about bytes, not about meaning."""
    source: str | None = None
    """Images to use instead of the small collection."""
    limit: int = 60
    """Images taken of `source`."""
    ray: bool = False
    keep: bool = False


def run_chaos(settings: ChaosSettings, say: Callable[[str], None]) -> int:
    """Kill, resume, compare; a line for each kill and a verdict. Returns 0 when all outputs equal the clean one, else 1.

    Raises BadRequest when the folder is not empty or the job itself cannot run.
    """
    if settings.kills < 1:
        raise BadRequest("nothing to kill", where="--kills", todo="ask for at least 1")
    if settings.out is not None:
        folder = Path(settings.out).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadRequest("the folder is not empty", where=str(folder), todo="choose a new folder for --out")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="dinoray-chaos-"))
    keep = settings.keep
    try:
        equal = _Test(settings, folder, say).run()
        keep = keep or not equal  # the objects that differ are the evidence
    finally:
        if keep:
            say(f"outputs kept: {folder}")
        else:
            shutil.rmtree(folder)
    return 0 if equal else 1


@dataclass
class _Test:
    settings: ChaosSettings
    folder: Path
    say: Callable[[str], None]
    rng: random.Random = field(init=False)
    number: int = 0
    """Kills so far."""
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.settings.seed)
        source = self.settings.source or str(self.folder / "pictures")
        if self.settings.source is None:
            self.say(f"{make_pictures(Path(source))} pictures that ship with scikit-image, 8 and 16 bits, one of them cut off")
        self.job = ["extract", "images", source, "--model", self.settings.model, "--weights", "random",
                    "--features", FEATURES, "--unit-items", "2", "--pattern", "none",
                    *(["--limit", str(self.settings.limit)] if self.settings.source is not None else []),
                    *(["--workers", "2", "--compute-threads", "1"] if self.settings.ray else ["--no-ray"])]

    def argv(self, out: Path) -> list[str]:
        """The command of the job on an output."""
        return [sys.executable, "-m", "dinoray.cli", *self.job, "--out", str(out)]

    def run(self) -> bool:
        """Everything; True when all is equal."""
        began, settings = time.monotonic(), self.settings
        clean = LocalStore(self.folder / "clean")
        first = start_and_strike(self.argv(clean.root), clean, [], rng=self.rng)
        if first.code not in COMPLETE:
            raise BadRequest(f"the job does not even run undisturbed (exit code {first.code}):\n{first.printed[-2000:]}",
                             where=" ".join(self.job), todo="mend the source or the model first")
        units = len(Plan(clean))
        self.say(f"clean run: {plural(units, 'unit')}, {len(_keys(clean))} data objects, {first.seconds:.1f} s of work")
        starts = deque(draw_kills(settings.kills, settings.seed, ray=settings.ray))
        outputs, missed = 0, 0
        while starts:
            outputs += 1
            store = LocalStore(self.folder / f"killed-{outputs}")
            struck, complete = self._one_output(store, starts, first.seconds, units)
            if not complete:
                break
            missed = 0 if struck else missed + 1
            self._compare(clean, store)
            if missed == MISSED_IN_A_ROW:
                self.problems.append(f"{sum(map(len, starts))} kills found no moment: the job is too short for them")
                break
        for problem in self.problems:
            self.say(f"  {problem}")
        verdict = f"{'NOT ' if self.problems else ''}EQUAL: {plural(self.number, 'kill')} (seed {settings.seed}) on"
        self.say(f"{verdict} {plural(outputs, 'output')}, each resumed with the same command and compared with a clean run, "
                 f"{time.monotonic() - began:.0f} s" + (f"; problems: {len(self.problems)}, listed above" * bool(self.problems)))
        return not self.problems

    def _one_output(self, store: LocalStore, starts: deque[list[Kill]], work_s: float, units: int) -> tuple[int, bool]:
        """Start and kill the command on one output until it is complete; kills that were missed go back to `starts`.

        Returns how many kills were carried out, and whether the output was completed.
        """
        struck, missed = 0, []
        while True:
            kills = starts.popleft() if starts else []
            start = start_and_strike(self.argv(store.root), store, kills, rng=self.rng, work_s=work_s, units=units)
            struck += len(start.carried_out)
            for kill in start.carried_out:
                self.number += 1
                self.say(f"kill {self.number:>2} of {self.settings.kills}: {_victim(kill, start)}; after this start "
                         f"{_survived(store, start, units)}")
            self.problems += [f"{store.root.name}: unit {unit} was started again though it had a receipt" for unit in start.again]
            missed += [kill for kill in kills if kill not in start.carried_out]
            if start.code in COMPLETE:
                if missed:
                    starts.appendleft(missed)
                return struck, True
            if start.code != -9 or not any(kill.victim == "driver" for kill in start.carried_out):
                self.problems.append(f"{store.root.name}: the command ended with exit code {start.code}:\n{start.printed[-2000:]}")
                return struck, False

    def _compare(self, clean: LocalStore, store: LocalStore) -> None:
        """Note all that differs from the clean output."""
        name, expected, found = store.root.name, _keys(clean), _keys(store)
        self.problems += [f"{name}: lost: {key}" for key in sorted(expected - found)]
        self.problems += [f"{name}: not in the clean run: {key}" for key in sorted(found - expected)]
        self.problems += [f"{name}: differs: {key}" for key in sorted(expected & found) if store.get(key) != clean.get(key)]
        self.problems += [f"{name}: left behind: {key}" for key, _ in store.list("_dinoray/tmp")]
        try:
            totals = verify_deep(store)
        except DinorayError as error:
            self.problems.append(f"{name}: verify --deep: {error}")
        else:
            self.say(f"{name}: complete, {totals['items']} images in {plural(totals['units'], 'unit')}, {totals['rows']} rows, "
                     f"{totals['quarantined']} quarantined; compared {len(expected)} data objects")


def _keys(store: LocalStore) -> set[str]:
    """The data objects of an output."""
    return {key for folder in DATA_FOLDERS for key, _ in store.list(folder)}


def _victim(kill: Kill, start: Start) -> str:
    """What was killed: the driver's own failpoints also strike the child in which it runs a unit that it isolates."""
    in_child = start.code in COMPLETE and kill.victim == "driver"
    return str(kill).replace("driver", "child of an isolated unit") if in_child else str(kill)


def _survived(store: LocalStore, start: Start, units: int) -> str:
    if start.code in COMPLETE:
        return "the run is complete"
    if not Plan.exists(store):
        return "no plan is sealed yet"
    return f"{start.done} of {units} units have their receipt ({start.before} before), {len(_keys(store))} data objects lie there"
