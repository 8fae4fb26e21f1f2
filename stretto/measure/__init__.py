"""Measuring: what counts as time, what is kept, and what may be said of it.

clock.py       what counts as training time
store.py       runs on disk, named by content
statistics.py  speed-ups, intervals, misses, power
recording.py   what any run records
single.py      one run, alone or on many ranks
race.py        interleaved contests to a target; memory.py its peaks, live.py its table while it runs
summary.py     what a race showed: numbers, sentences, the table
report.py      one HTML page, from stored runs only
"""
