"""Programs to dump that are not C: see heap.py. The static C programs are in tests/data/src."""
