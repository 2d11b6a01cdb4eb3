"""Which kills a seed gives, and in which starts of the command they are carried out.

A kill is SIGKILL, at a named point (dinoray.failpoints) or at a random moment, of the driver or of an actor.
Kills are ordered by the stage of a run in which they strike, so that one output meets as many as it can.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

STATISTICS = ("stats.begin", "stats.data", "stats.receipt", "stats.done")
UNITS = ("item.load", "unit.begin", "unit.data", "unit.receipt", "unit.done")
STAGES = ("plan.request", "plan.file", "plan.seal", *STATISTICS, "plan.file@2", "plan.seal@2", *UNITS, "run.verify")
"""The points at which a kill can strike, in the order in which a run passes them: first the plan of the statistics
pass is written, then (second passage) the plan itself."""
IN_ACTORS = frozenset((*STATISTICS, *UNITS))
"""Points that are passed where units run: in an actor, or in the driver when there is no Ray."""
RANDOM_SHARE = 0.25
"""Share of the kills that strike at random moments."""
ACTORS_PER_START = 4
"""Under Ray: so many kills of actors, then one of the driver."""


@dataclass(frozen=True)
class Kill:
    """One kill: at the `passage`-th passage of `point`, or without a point after `moment` of what is left of a run (0..1)."""

    victim: str
    """`driver` or `actor`."""
    point: str = ""
    passage: int = 1
    moment: float = 0.0

    def __str__(self) -> str:
        return f"{self.victim} at {self.point}, passage {self.passage}" if self.point else f"{self.victim} at a random moment"

    @property
    def entry(self) -> str:
        """Its entry in DINORAY_FAILPOINTS."""
        return f"{self.point}=kill@{self.passage}"


def draw_kills(count: int, seed: int, *, ray: bool) -> list[list[Kill]]:
    """`count` kills, in the starts of the command that are to meet them; a start ends with the driver's kill, if it has one.

    Every named point comes once before one comes twice. Without Ray the driver is the only process that can be killed.
    """
    rng = random.Random(seed)
    moments = [rng.random() for _ in range(round(count * RANDOM_SHARE))]
    named = _named(count - len(moments), rng)
    if not ray:
        kills = [_kill("driver", point, rng, 3) for point in named]
        for moment in moments:
            kills.insert(rng.randint(0, len(kills)), Kill("driver", moment=moment))
        return [[kill] for kill in kills]
    starts: list[list[Kill]] = [[]]
    for number, point in enumerate(named):
        if point not in IN_ACTORS:
            starts[-1].append(_kill("driver", point, rng, 1))
            starts.append([])
            continue
        starts[-1].append(_unlike(_kill("actor", point, rng, 2), starts[-1]))
        if point in UNITS and moments and number % 2:
            starts[-1].append(Kill("actor", moment=moments.pop()))
        if point in UNITS and moments and len(starts[-1]) >= ACTORS_PER_START:
            starts[-1].append(Kill("driver", moment=moments.pop()))
            starts.append([])
    starts += [[Kill("driver", moment=moment)] for moment in moments]
    return [start for start in starts if start]


def _named(count: int, rng: random.Random) -> list[str]:
    """`count` points in stage order: all of them, then more of those that units pass; a sample if there are fewer."""
    points = rng.sample(STAGES, min(count, len(STAGES)))
    points += rng.choices(UNITS, k=count - len(points))
    return sorted(points, key=STAGES.index)


def _kill(victim: str, stage: str, rng: random.Random, most: int) -> Kill:
    """A kill at a stage, in one of the first `most` passages where units give many."""
    point, _, passage = stage.partition("@")
    return Kill(victim, point, rng.randint(1, most) if point in UNITS else int(passage or 1))


def _unlike(kill: Kill, others: list[Kill]) -> Kill:
    """The kill, at a later passage when there is one like it: an entry acts once."""
    while kill in others:
        kill = replace(kill, passage=kill.passage + 1)
    return kill
