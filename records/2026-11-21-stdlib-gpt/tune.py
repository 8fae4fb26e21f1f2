"""Tune an AdamW arm of stdlib-gpt: learning rate x batch size x weight decay in factors of 2, by a star search.

    python records/2026-11-21-stdlib-gpt/tune.py baseline --out runs-tune

From a start point all six neighbours are run; the best becomes the next start, until none of the neighbours
is better: the point is then interior to the grid in every direction. One seed, not one that is raced. Every
run spends the whole budget, its schedule decayed to zero; the budget is the same in time for every batch
size. Prints every trial; the runs stay in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stretto.measure.race import race
from stretto.measure.store import Store
from stretto.methods import AdamW
from stretto.recipes import Arm, arms
from stretto.workloads import find

SEED = 1000
TOLERANCE = 0.001  # a neighbour must be better by more to be moved to; seeds deviate by far more
# Examples that cost as much CPU time as 2400 in batches of 4 (milliseconds a step, one thread: 24, 35, 60, 111).
BUDGETS = {1: 1500, 2: 2080, 4: 2400, 8: 2600, 16: 2720}
FIELDS = ("lr", "batch", "weight_decay")
Point = tuple[float, int, float]


def final_loss(store: Store, arm: Arm, seed: int) -> float:
    """Loss at the end of the budget."""
    race_id = race(
        find("stdlib-gpt"), [arm], store, target=None, seeds=[seed], control="off", footprints=False
    )
    run = store.run(store.race(race_id)["arms"][0]["runs"][0])
    return run.rows()[-1]["loss"] if run.record["state"] == "done" else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=("baseline", "modern"))
    parser.add_argument("--out", type=Path, default=Path("runs-tune"))
    options = parser.parse_args()
    store = Store(options.out / options.arm)
    base = arms("stdlib-gpt", options.arm)[options.arm]
    seen: dict[Point, float] = {}

    def loss(point: Point) -> float:
        if point not in seen:
            lr, batch, decay = point
            recipe = base.recipe.replace(AdamW, lr=lr, weight_decay=decay)
            seen[point] = final_loss(store, Arm(f"{options.arm} trial", recipe, batch, BUDGETS[batch]), SEED)
            print(
                f"{len(seen):3} lr={lr:g} batch={batch} weight_decay={decay:g}: {seen[point]:.4f}", flush=True
            )
        return seen[point]

    best: Point = (1e-3, 4, 0.1)
    while True:
        star = [best]
        for axis in range(3):
            for factor in (0.5, 2):
                moved = list(best)
                moved[axis] = type(moved[axis])(moved[axis] * factor)
                star.append((float(moved[0]), int(moved[1]), float(moved[2])))
        winner = min((point for point in star if point[1] in BUDGETS), key=loss)
        if loss(winner) > loss(best) - TOLERANCE:
            break
        best = winner
    print(f"best: {dict(zip(FIELDS, best))}, loss {seen[best]:.4f}, {len(seen)} trials")


if __name__ == "__main__":
    main()
