"""Measuring: what counts as time, what is kept, and what may be said of it.

clock.py       what counts as training time
store.py       runs on disk, named by content
recording.py   what any run records
single.py      one run, alone or on many ranks
race.py        interleaved contests to a target; footprint.py what steps need, live.py its table while it runs

outcomes.py    crossings of a target that persist, and what a run comes to
statistics.py  speed-ups, intervals, verdicts; survival.py where runs missed; power.py seeds, many comparisons
quality.py     speed-up at equal quality over budgets, and the Pareto frontier; quality_plan.py trains what it takes,
               equal.py what that showed
suite.py       the mean over workloads
designs.py     which compositions a study runs; effects.py what each method does, alone and together
composition.py which composition to use, and what its members are worth
algoperf.py    AlgoPerf's scores; algoperf_logs.py its logs

study_plan.py  which compositions a study will run, for how long and what they will tell; study.py runs it,
               executors.py elsewhere; study_summary.py what it showed; forecast.py hours to expect
recommend.py   from a study to a recipe, raced on fresh seeds
tune.py        successive halving; samplers.py what is tried next

summary.py     what a race showed: numbers, sentences, the table; caveats.py what to mind; on_the_way.py easier
               targets; misses.py what is known where runs missed
sources.py     what is asked to be reported; reading.py what of it can be read
report.py      one HTML page, from stored runs only; figures.py, study_figures.py, equal_figures.py and
               drawing.py its figures
export.py      the same as Markdown, CSV and JSON
"""
