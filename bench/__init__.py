"""The project's benchmark: every figure that ckptfs promises, measured beside a peer in the same run.

lab.py makes what is measured (real criu dumps in a real registry), flows.py does what users do, rows/ has one module
per figure, __main__.py runs them. What is measured with, and the report, is ckptfs/bench/.
"""
