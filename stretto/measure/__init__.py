"""Measuring: what counts as time, what is kept, and what may be said of it.

clock.py       what counts as training time
store.py       runs on disk, named by content
recording.py   what any run records
single.py      one run, alone or on many ranks
race.py        interleaved contests to a target; memory.py its peaks, live.py its table while it runs

outcomes.py    crossings of a target that persist, and what a run comes to
statistics.py  speed-ups, intervals, verdicts; survival.py where runs missed; power.py seeds, many comparisons
quality.py     speed-up at equal quality over budgets, and the Pareto frontier
suite.py       the mean over workloads
designs.py     which compositions a study runs; effects.py what each method does, alone and together
composition.py which composition to use, and what its members are worth
algoperf.py    AlgoPerf's scores; algoperf_logs.py its logs

summary.py     what a race showed: numbers, sentences, the table
report.py      one HTML page, from stored runs only
"""
