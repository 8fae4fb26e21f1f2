"""Made-up runs, races and studies, as they would be stored."""

import json
import math
import random

from stretto.measure import designs

HOSTILE = "<script>alert('x')</script> | $x^2$ #0a0b05"


def train(store, arm, seed, *, rate, cost, steps, state="target", sitting="now", target=2.0, batch=64):
    """A made-up run: loss 1.9 + 3.4·exp(−rate·step), 40 evaluations, `cost` seconds a step."""
    chance = random.Random(f"{arm} {seed}")
    rate, cost = rate * math.exp(chance.gauss(0, 0.05)), cost * math.exp(chance.gauss(0, 0.02))
    identity = {"workload": "stdlib-gpt", "recipe_hash": f"hash-{len(arm)}", "arm": arm, "seed": seed}
    record = {
        "sitting": sitting, "workload": {"name": "stdlib-gpt"}, "recipe": {}, "budget": steps * batch,
        "seed": seed, "arm": arm, "execution": {"device": "cpu", "threads": 2, "compile": False},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "stretto": "0.1.0"},
        "machine": {"processor": "A processor of 2 cores", "cores": 2, "system": "Linux"},
        "state": "running", "error": None, "crossing": None, "clock": None, "memory": None,
    }  # fmt: skip
    run = store.create(identity, record)
    every, before, crossing, rows = max(1, steps // 40), 0, None, []
    for step in range(every, steps + 1, every):
        loss = 1.9 + 3.4 * math.exp(-rate * step) + chance.gauss(0, 0.01)
        rows.append(
            {"step": step, "fraction": step / steps, "wall": step * cost, "cpu": step * cost * 1.9,
             "examples": step * batch, "tokens": None, "train_loss": loss, "loss": loss}
        )  # fmt: skip
        if crossing:
            break
        if loss <= target and state == "target":
            crossing = {"before": before, "at": step}
        before = step
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clock = {"wall": step * cost, "cpu": step * cost * 1.9, "compile": 0.5}
    run.update(state=state if crossing or state != "target" else "done", crossing=crossing, clock=clock)
    return run


def arm(store, name, seeds, *, methods=(), times=None, short="", **training):
    runs = [train(store, name, seed, **training) for seed in seeds]
    return {
        "name": name, "recipe": {"methods": list(methods)}, "short": short, "hash": "abc", "batch": 64,
        "budget": training["steps"] * 64, "parameters": 1_234_567, "memory": 345_000_000,
        "flops": 2_000_000_000,
        "runs": [run.id for run in runs], "times": times(runs) if times else {},
    }  # fmt: skip


def adamw(lr):
    return {"method": "adamw", "lr": lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def cosine():
    return {"method": "cosine", "warmup": 0.02, "end": 0.0}


def make_race(arms, **fields):
    return {
        "schema": 1, "created": "2026-11-07T10:15:00+00:00", "workload": "stdlib-gpt", "metric": "loss",
        "falls": True, "fingerprint": "0f1e2d3c4b5a", "target": 2.0, "target_name": "baseline",
        "target_valid": True, "reference": "baseline", "control": None, "arms": arms,
        "order": [0, 1] * 70, "sitting": "now", **fields,
    }  # fmt: skip


METHODS = {"mixup": 1.02, "ema": 1.10, "blur_pool": 1.01, "stochastic_depth": 0.97, "label_smoothing": 1.08}


def make_study(store, *, seeds=(0, 1), state="target", **fields):
    """A half fraction of five methods with known factors of speed; mixup and ema overlap."""
    design = designs.fraction(list(METHODS), resolution=5)
    shorts = [f"{name}:share=0.2" if name == "mixup" else name for name in METHODS]
    base = [cosine(), adamw(0.002)]
    rows = [[0] * len(METHODS), *design.rows.tolist()]
    names, arms = [], []
    for row in rows:
        chosen = [name for name, present in zip(METHODS, row) if present]
        name = " + ".join(chosen) or "baseline"
        faster = math.prod(METHODS[one] for one in chosen) ** 3
        faster *= 0.9 if {"mixup", "ema"} <= set(chosen) else 1.0
        methods = [*base, *({"method": one} for one in chosen)]
        short = ", ".join(["cosine", "adamw:lr=0.002", *chosen])
        if name not in names:
            training = {"rate": 0.0035 * faster, "cost": 0.03, "steps": 2000, "state": state}
            arms.append(arm(store, name, seeds, methods=methods, short=short, **training))
        names.append(name)
    control = arm(store, "baseline (control)", seeds, methods=base, rate=0.0035, cost=0.03, steps=2000)
    race = store.save_race(make_race([arms[0], control, *arms[1:]], control="baseline (control)", **fields))
    return store.save_study(
        {
            "workload": "stdlib-gpt", "fingerprint": "0f1e2d3c4b5a", "target_name": "baseline", "state": "done",
            "reference": {"name": "baseline", "methods": base, "batch": 64, "budget": 128_000},
            "methods": shorts, "arms": names, "seeds": list(seeds), "executor": "interleaved", "race": race,
            "design": {"name": design.name, "rows": rows, "words": [], "dropped": [], "conflicts": []},
        }
    )  # fmt: skip
