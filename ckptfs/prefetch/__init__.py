"""What to fetch before it is asked for, as plans: iterators of chunks in the order in which they will be wanted.

A plan is made of the finished tree, or of a recorded profile and the tree; the engine fetches. A new one is a module
here and a line in image/ahead.py.
"""
