"""`pidpool demo`: the failures of a fork, measured with SQLAlchemy's pool and with PidPool.

`contenders.py` has the pools and `failures.py` the failures. `worker.py` is the process that measures
one failure with one pool; `measuring.py` runs these processes one after the other. `verdicts.py` judges
the numbers and `report.py` shows them. `postgres.py` and `supervisor.py` run the demo's own server.
Needs ``pidpool[demo]``.
"""
