"""What `pidpool demo` measures: failures of a fork, of SQLAlchemy's pool and of pidpool side by side.

`contenders.py` has the pools, `failures.py` what is done to each of them, `worker.py` is the process
that does it, `measuring.py` runs one such process after the other, `verdicts.py` says what the numbers
mean, and `report.py` shows them. Needs ``pidpool[demo]``.
"""
