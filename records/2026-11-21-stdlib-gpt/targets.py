"""Where the targets come from: the worst final value of five seeds that no race uses, plus their deviation.

    python records/2026-11-21-stdlib-gpt/targets.py stdlib-gpt baseline --out runs-targets

Trains the named arm, which is also the target's name, to the end of its budget on seeds 100 to 104.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from stretto.measure.race import race
from stretto.measure.store import Store
from stretto.recipes import arms
from stretto.workloads import find

SEEDS = range(100, 105)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("arm")
    parser.add_argument("--out", type=Path, default=Path("runs-targets"))
    options = parser.parse_args()
    store, workload = Store(options.out), find(options.workload)
    finals = []
    for seed in SEEDS:
        arm = arms(workload.name, options.arm)[options.arm]
        race_id = race(workload, [arm], store, target=None, seeds=[seed], control="off", footprints=False)
        run = store.run(store.race(race_id)["arms"][0]["runs"][0])
        finals.append(run.rows()[-1][workload.metric])
        print(f"seed {seed}: {finals[-1]:.4f}", flush=True)
    spread = statistics.stdev(finals)
    target = max(finals) + spread if workload.falls else min(finals) - spread
    print(
        f"{workload.name} {options.arm}: deviation {spread:.4f}, target {target:.4f} on {workload.fingerprint}"
    )


if __name__ == "__main__":
    main()
