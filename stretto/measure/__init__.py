"""Measuring: what counts as time, what is kept, and what may be said of it.

clock.py       what counts as training time
store.py       runs on disk, named by content
race.py        interleaved contests to a target
statistics.py  speed-ups, intervals, misses, power
report.py      one HTML file, and tables, from stored runs only
"""
