"""The tests in two lanes at once: what starts Ray, which mostly waits, beside all the rest.

    python tests/lanes.py [--all] [ARGUMENTS OF PYTEST]

`--all` adds the slow tests. The rest is printed as it runs, then the lane of Ray; the exit code is the worse of the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

LANES = {"ray": "ray", "rest": "not ray"}
NOTHING_COLLECTED = 5


def main(arguments: list[str]) -> int:
    """Run both; returns the exit code."""
    only = "" if "--all" in arguments else " and not slow"
    given = [argument for argument in arguments if argument != "--all"]
    # two lanes on two cores: more threads would only wait for each other
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    with tempfile.TemporaryFile("w+") as printed:
        running = {name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-m", f"({marks}){only}", "-p", "no:cacheprovider", *given], env=env,
            stdout=printed if name == "ray" else None, stderr=subprocess.STDOUT if name == "ray" else None)
            for name, marks in LANES.items()}
        codes = {"rest": running["rest"].wait(), "ray": running["ray"].wait()}
        printed.seek(0)
        print(f"\n{' the lane of Ray ':=^100}\n{printed.read()}", flush=True)
    print(", ".join(f"lane {name}: exit code {code}" for name, code in codes.items()))
    if all(code == NOTHING_COLLECTED for code in codes.values()):
        return NOTHING_COLLECTED
    return max(abs(code) for code in codes.values() if code != NOTHING_COLLECTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
