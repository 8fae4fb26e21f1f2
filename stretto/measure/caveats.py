"""What a reader must know before believing a race: each function turns what is stored into sentences, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stretto.measure.power import holm, seeds_needed
from stretto.measure.statistics import figure, mean

if TYPE_CHECKING:
    from stretto.measure.summary import Arm, Summary

EARLY = 0.75  # share of the budget; a reference that crosses before it would do on a smaller one
DECAYED = 0.1  # factor of the learning rate at the end, above which it has not decayed
FAINT = 0.005  # speed-ups closer to 1 are not worth any number of seeds
MANY = 1000  # seeds that nobody trains

# What the learning rate is of its peak at the end of the budget, by the method and its fields.
SCHEDULES = ("cosine", "linear_to_zero", "power_cool", "warmup_stable_decay")
DECAYLESS = ("schedule_free",)  # as good as decayed at any time

BENT = {
    "loss": {
        "label_smoothing": "trains for softer targets than the loss is measured on",
        "mixup": "trains on mixed targets, which make the model less sure than the loss rewards",
        "cutmix": "trains on mixed targets, which make the model less sure than the loss rewards",
        "binary_cross_entropy": "trains for another loss than the one measured",
        "dice": "trains for another loss than the one measured",
    },
    "accuracy": {},
}
EVALUATION = {
    "test_time_augmentation": "spends more time at evaluation, which the clock does not count",
    "fix_res": "spends another time at evaluation, which the clock does not count",
}


def warnings(summary: Summary, tunings: Sequence[dict[str, Any]] = ()) -> list[str]:
    """All caveats of a race, the gravest first; `tunings` are the stored records of its folder."""
    parts = (
        state(summary), fingerprint(summary), control(summary), schedule(summary), tuning(summary, tunings),
        bent(summary), grid(summary), power(summary), comparisons(summary), losses(summary),
    )  # fmt: skip
    return [sentence for part in parts for sentence in part]


def state(summary: Summary) -> Iterator[str]:
    """A race that was interrupted, and one without a target."""
    if summary.race.get("interrupted"):
        yield "The race was interrupted: this is what it has so far."
    if summary.race["target"] is None:
        yield "This race had no target: each recipe trained to the end of its budget, and none is ahead."


def fingerprint(summary: Summary) -> Iterator[str]:
    """Data that is not what the target was set on, or not the same in all runs."""
    race = summary.race
    if race["target"] is not None and not race["target_valid"]:
        why = race.get("target_why") or (
            "The data found here is not the data that the target was set on (its fingerprint differs), "
            "so there is no verdict."
        )
        yield why
    found = {(run.record.get("workload") or {}).get("fingerprint") for run in summary.runs}
    others = sorted(str(one) for one in found - {None, race["fingerprint"]})
    if others:
        yield (
            f"Some runs were trained on other data than the race (fingerprint {', '.join(others)}, not "
            f"{race['fingerprint']}): they do not compare."
        )


def control(summary: Summary) -> Iterator[str]:
    """No control, or one that excludes 1."""
    race = summary.race
    arm = next((arm for arm in summary.arms if arm.name == race.get("control")), None)
    if arm is None:
        yield "This race had no control, so nothing tells how far the clock can be trusted."
        return
    for ratio, what in ((arm.wall, "wall"), (arm.cpu, "CPU")):
        if ratio and ratio.verdict != "not resolved":
            yield (
                f"The control, {race['reference']} raced against itself, came out at {ratio.figures} in {what} "
                "time, which excludes 1: differences of this size are this machine's noise."
            )


def schedule(summary: Summary) -> Iterator[str]:
    """A reference that is not fully decayed where it stops, which makes it slower than it need be."""
    arm = _reference(summary)
    if arm is None:
        return
    end = final(arm.recipe)
    if end is not None and end > DECAYED:
        yield (
            f"{arm.label}, the reference, ends its budget with the learning rate at {_percent(end)} of its peak: its "
            "schedule does not end there, which alone can fake a speed-up. Give it one that decays to 0."
        )
    shares = [result.fraction for result in arm.results if result.reached and result.fraction]
    if summary.race["target"] is not None and shares and mean(shares) < EARLY:
        yield (
            f"{arm.label}, the reference, reached the target at {_percent(mean(shares))} of its budget, before its "
            "schedule ended: with a smaller budget it may get there sooner, and the speed-ups would shrink."
        )


def final(recipe: dict[str, Any]) -> float | None:
    """The learning rate at the end of the budget over its peak, from a stored recipe; none where unknown."""
    methods = recipe.get("methods")
    if not isinstance(methods, list) or not methods:
        return None
    fields = {method.get("method"): method for method in methods}
    if any(name in fields for name in DECAYLESS):
        return 0.0
    found = next((fields[name] for name in SCHEDULES if name in fields), None)
    if found is None:
        return 1.0
    return 1.0 if 0 in (found.get("decay"), found.get("cooldown")) else float(found.get("final", 0.0))


def tuning(summary: Summary, tunings: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tuned values at the edge of what was tried, and arms tuned unequally."""
    if not tunings:
        return
    from stretto.measure import tune

    arms = [arm for arm in summary.arms if arm.name != summary.race.get("control")]
    trials = dict.fromkeys((arm.name for arm in arms), 0)
    for record in tunings:
        counted = tune.trials(record)
        for entry in record["arms"]:
            hashes = {entry["hash"], (entry["winner"] or entry)["hash"]}
            raced = [arm.name for arm in arms if arm.name == entry["name"] or arm.hash in hashes]
            for name in raced:
                trials[name] += counted[entry["name"]]
            if raced:
                yield from tune.edges({**record, "arms": [entry]})
    reference = _reference(summary)
    if reference is None or not any(trials.values()):
        return
    own = trials[reference.name]
    for others, what in (
        ([arm for arm in arms if trials[arm.name] > own], "less hard, which alone can fake a speed-up"),
        ([arm for arm in arms if trials[arm.name] < own], "harder, and the others may do better than here"),
    ):
        if others:
            each = _listed([f"{arm.label} with {trials[arm.name]}" for arm in others])
            yield f"{reference.label}, the reference, was tuned with {own} trials, {each}: {what}."


def bent(summary: Summary) -> Iterator[str]:
    """A metric that a method changes the meaning of, in some arms and not in the reference."""
    reference = _reference(summary)
    if reference is None:
        return
    table, metric = BENT.get(summary.race["metric"], {}), summary.race["metric"]
    for name, why in (table | EVALUATION).items():
        arms = [arm for arm in summary.arms if (name in _names(arm)) != (name in _names(reference))]
        arms = [arm for arm in arms if arm.name != summary.race.get("control")]
        if not arms:
            continue
        who = [reference.label] if name in _names(reference) else [arm.label for arm in arms]
        advice = "look at another metric too" if name in table else "count it yourself"
        yield f"{name} {why}, so {metric} does not mean the same in all arms: {advice} (in {_listed(who)})."


def grid(summary: Summary) -> Iterator[str]:
    """Evaluations too far apart to see the difference between two arms."""
    reference = _reference(summary)
    coarse = []
    for arm in summary.arms:
        found = arm.steps
        if reference is None or arm.name == summary.race.get("control") or not (found and found.estimate):
            continue
        gap = max(_gap(arm), _gap(reference))
        if abs(math.log(found.estimate)) < gap:
            coarse.append((arm.label, math.expm1(gap)))
    if coarse and reference:
        most = max(gap for _, gap in coarse)
        yield (
            f"Evaluations lie up to {_percent(most)} of the steps to the target apart, more than the difference in "
            f"steps between {reference.label} and {_listed([label for label, _ in coarse])}: evaluate more "
            "often to see it (--evaluations)."
        )


def _gap(arm: Arm) -> float:
    """Mean log distance, in steps, between a crossing and the evaluation before it."""
    gaps = [math.log(result.steps / result.before) for result in arm.results if result.before]
    return mean(gaps) if gaps else 0.0


def power(summary: Summary) -> Iterator[str]:
    """How many seeds would resolve what is not resolved."""
    if not summary.race["target_valid"]:
        return
    wanted = []
    for arm in summary.arms:
        found = arm.wall or arm.steps
        if arm.name == summary.race.get("control") or not found or found.verdict != "not resolved":
            continue
        effect = math.expm1(abs(math.log(found.estimate))) if found.estimate else 0.0
        if effect < FAINT or not found.spread:
            continue
        paired = found.method == "paired"
        needed = max(seeds_needed(effect, min(found.spread, 1.0), paired=paired), len(arm.results) + 1)
        told = f"more than {MANY}" if needed > MANY else f"about {needed}"
        wanted.append(f"{arm.label} ({figure(found.estimate or 1.0)}x) {told}")
    if wanted:
        yield (
            "Seeds an arm that would resolve what is not resolved, if it is as far from 1 as it looks: "
            f"{_listed(wanted)}."
        )


def comparisons(summary: Summary) -> Iterator[str]:
    """Verdicts that do not outlive the number of comparisons."""
    told = [(arm, arm.wall or arm.steps) for arm in summary.arms if arm.name != summary.race.get("control")]
    tested = [(arm, found, found.p_value) for arm, found in told if found and found.p_value is not None]
    adjusted = holm([p for _, _, p in tested])
    lost = [
        arm.label
        for (arm, found, _), p in zip(tested, adjusted)
        if found.verdict != "not resolved" and p > 1 - found.confidence
    ]
    if lost:
        yield (
            f"With {len(tested)} comparisons at once, what is said of {_listed(lost)} could be chance: Holm's "
            "correction for their number leaves it not resolved."
        )


def losses(summary: Summary) -> Iterator[str]:
    """Runs that did not finish, and runs that failed."""
    for arm in summary.arms:
        if arm.unfinished:
            yield f"{arm.label}: {arm.unfinished} of its runs did not finish and count nowhere."
        for result in arm.results:
            if result.state == "failed":
                reason = result.error or "no reason was kept"
                yield f"{arm.label}, seed {result.seed}, failed: {reason}. It counts as a miss."


def _reference(summary: Summary) -> Arm | None:
    return next((arm for arm in summary.arms if arm.name == summary.race["reference"]), None)


def _names(arm: Arm) -> set[str]:
    """The methods of a stored recipe, those inside others too."""

    def inside(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("method"), str):
                yield value["method"]
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from inside(item)

    return set(inside(arm.recipe))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(labels: Sequence[str], most: int = 3) -> str:
    """Names in a sentence; of many, the first and how many more."""
    if len(labels) > most:
        return f"{', '.join(labels[: most - 1])} and {len(labels) - most + 1} more"
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
