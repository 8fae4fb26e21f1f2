import pytest
from made import HOSTILE, adamw, arm, cosine, make_race

from stretto.measure.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@pytest.fixture
def full_race(store):
    """A race with everything: a control, a winner, misses, remeasured and unmeasured runs, hostile names."""
    baseline = {"rate": 0.0035, "cost": 0.03, "steps": 2000, "methods": [adamw(0.002), cosine()]}
    rotary = [{"method": "rotary_positions", "base": 10000}, adamw(0.002), cosine()]
    fast = [
        {"method": "ngram_embeddings", "orders": [2, 3], "rows": 65536},
        {"method": "value_embeddings"},
        {"method": "muon", "lr": 0.02, "momentum": 0.95, "rest": adamw(0.003)},
        {"method": "warmup_stable_decay", "warmup": 0.0, "decay": 0.6},
    ]
    short = "ngram_embeddings, value_embeddings, muon:lr=0.02, warmup_stable_decay:decay=0.6"
    hostile = [{"method": "<b>sgd</b>", "note": "</script><img src=x>"}]
    stored = {"rate": 0.01, "cost": 0.03, "steps": 1000, "sitting": "before"}

    def measured(runs):
        return {r.id: {"wall": 12.0 + i, "cpu": 22.0 + i, "source": "remeasured"} for i, r in enumerate(runs)}

    arms = [
        arm(store, "baseline", range(3), short="adamw:lr=0.002, cosine", **baseline),
        arm(store, "baseline (control)", range(3), short="adamw:lr=0.002, cosine", **baseline),
        arm(store, "modern", range(3), methods=rotary, rate=0.0037, cost=0.031, steps=2000),
        arm(store, "fast", range(3), methods=fast, short=short, rate=0.02, cost=0.047, steps=500),
        arm(store, HOSTILE, range(3), methods=hostile, rate=0.001, cost=0.02, steps=2000),
        arm(store, "stored", range(3), times=measured, **stored),
        arm(store, "steps", range(3), **stored),
    ]
    return store.save_race(make_race(arms, control="baseline (control)"))
