"""The trials of `fast` on stdlib-gpt, in the order in which they were made; no more than a tuned arm had.

    python records/2026-11-21-stdlib-gpt/search.py --out runs-tune/fast

Each line is an arm as the command line takes it, trained to the end of its budget on the seed that tuned the
baseline. Prints the final loss and the CPU seconds; the runs stay in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stretto.measure.race import race
from stretto.measure.store import Store
from stretto.recipes import arm
from stretto.workloads import find

SEED = 1000
BODY = "rotary_positions, qk_norm, squared_relu, zero_init_residual, short_convolution, warmup_stable_decay"
LEAN = "rotary_positions, squared_relu, zero_init_residual, warmup_stable_decay"
TABLES = "ngram_embeddings, value_embeddings"
TRIALS = [
    f"{BODY}, {TABLES}, muon @ batch=8 budget=160",
    f"{BODY}, {TABLES}, muon @ batch=4 budget=120",
    f"{BODY}, {TABLES}, muon:lr=0.04:adam_lr=0.008 @ batch=8 budget=160",
    f"{BODY}, ngram_embeddings:rate=4, value_embeddings, muon @ batch=8 budget=160",
    f"{BODY}, ngram_embeddings:rate=8, value_embeddings, muon @ batch=16 budget=192",
    f"{BODY}, ngram_embeddings:rate=8, value_embeddings, muon:iterations=3 @ batch=8 budget=112",
    f"{BODY}, ngram_embeddings:rate=8, value_embeddings, muon:momentum=0.85 @ batch=8 budget=112",
    f"{BODY}, ngram_embeddings:rate=8:rows=4096, value_embeddings, muon @ batch=8 budget=112",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:momentum=0.85 @ batch=8 budget=112",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, adamw:lr=0.004 @ batch=8 budget=112",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:lr=0.03:adam_lr=0.008:momentum=0.85 @ batch=8 budget=112",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:momentum=0.85:iterations=3 @ batch=8 budget=112",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=80",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:lr=0.03:adam_lr=0.008:momentum=0.85 @ batch=8 budget=224",
    f"{LEAN}, short_convolution, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=480",
    f"{LEAN}, short_convolution, ngram_embeddings:rate=4, value_embeddings, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=192",
    f"{LEAN}, short_convolution, muon:lr=0.03:adam_lr=0.008:momentum=0.85 @ batch=8 budget=400",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=224",
    f"{LEAN}, short_convolution, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=400",
    f"{LEAN}, ngram_embeddings:rate=8, value_embeddings, muon:lr=0.03:adam_lr=0.016:momentum=0.85 @ batch=8 budget=88",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs-tune/fast"))
    options = parser.parse_args()
    store, workload = Store(options.out), find("stdlib-gpt")
    for number, text in enumerate(TRIALS, 1):
        trial = arm(text, workload.name, "baseline")
        race_id = race(workload, [trial], store, target=None, seeds=[SEED], control="off", footprints=False)
        rows = store.run(store.race(race_id)["arms"][0]["runs"][0]).rows()
        last = rows[-1]
        print(
            f"{number:2} {last['loss']:.4f} in {last['cpu']:.1f} CPU s, {last['step']} steps: {text}",
            flush=True,
        )


if __name__ == "__main__":
    main()
