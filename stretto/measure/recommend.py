"""From a study to a recipe: the best composition, what each member gives, and its race on fresh seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.measure.race import Standing, race
from stretto.measure.store import Store, stopping_clearly
from stretto.measure.study_summary import StudySummary, shown, summarise_study
from stretto.measure.summary import summarise

if TYPE_CHECKING:
    from stretto.recipes import Arm
    from stretto.workloads import Workload

WORDS = {"faster": "Confirmed", "slower": "Refuted", "not resolved": "Not confirmed"}


def recommend(store: Store, study_id: str) -> StudySummary:
    """What a stored study showed, which has a best composition.

    ValueError where there is no such study, or its runs do not tell.
    """
    summary = summarise_study(store, store.study(study_id))
    if summary.best is None:
        raise ValueError(f"study {study_id} has too few runs to recommend from: {summary.sentences[0]}")
    return summary


def sentences(summary: StudySummary) -> list[str]:
    """The recommendation in words: what to use, what each member gives, what to leave out."""
    best, state = summary.best, summary.study["state"]
    assert best
    told = [summary.sentences[0]]
    if state != "done":
        told.append(f"The study is {state}; this is what its runs so far tell.")
    if len(best.composition) > 1:
        shares = ", ".join(f"{name} {shown(share)}" for name, share in best.shares.items())
        told.append(f"Its members' shares, which multiply to the whole: {shares}.")
        costs = ", ".join(f"{name} {shown(cost)}" for name, cost in best.removal.items())
        told.append(f"What leaving one out costs: {costs}.")
    if best.drop:
        told.append(f"To drop where it is simpler without: {', '.join(best.drop)}; no cost of that is known.")
    unused = [name for name in summary.methods if name not in best.composition]
    if unused and best.composition:
        told.append(f"Not worth adding: {', '.join(unused)}.")
    return told


def write_file(arm: Arm, path: Path) -> None:
    """A recipe file, which `stretto race --recipes` reads. ValueError where it cannot be written."""
    data = {"name": arm.name, **arm.recipe.to_json(), "batch": arm.batch, "budget": arm.budget}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another with --to") from None


def confirm(
    store: Store,
    workload: Workload,
    summary: StudySummary,
    reference: Arm,
    arm: Arm,
    count: int,
    *,
    footprints: bool = True,
    watch: Callable[[Sequence[Standing]], None] = lambda standings: None,
) -> dict[str, Any] | None:
    """Race the recommended arm against the reference on so many seeds that the study did not use.

    Returns what is stored as the study's "confirmation"; none, and nothing stored, where it was interrupted.
    ValueError where the data is not the study's.
    """
    best, study = summary.best, summary.study
    assert best
    if workload.fingerprint != study["fingerprint"]:
        raise ValueError(
            f"study {study['id']} was run on other data than is found here (its fingerprint is "
            f"{study['fingerprint']}, not {workload.fingerprint}); confirm it with the study's data"
        )
    first = max(study["seeds"]) + 1
    seeds = range(first, first + count)
    with stopping_clearly(store.root):
        race_id = race(
            workload,
            [reference, arm],
            store,
            target=study["target_name"],
            seeds=seeds,
            footprints=footprints,
            watch=watch,
        )
        raced = store.race(race_id)
        if raced["interrupted"]:
            return None
        raced_arm, answer = summarise(store, raced).answers[0]
        speed_up = raced_arm.wall or raced_arm.steps
        assert speed_up
        verdict = WORDS[speed_up.verdict] if raced["target_valid"] else "No verdict"
        confirmation = {
            "race": race_id,
            "seeds": list(seeds),
            "composition": list(best.composition),
            "hash": arm.recipe.hash,
            "unit": "wall" if raced_arm.wall else "steps",
            "speed_up": asdict(speed_up),
            "expected": list(best.speed_up),
            "sentence": f"{verdict}: {answer} The study expected {shown(best.speed_up)}.",
        }
        store.save_study({**study, "confirmation": confirmation})
    return confirmation
