"""What it costs to switch from SQLAlchemy's QueuePool to PidPool. `make bench` runs it all.

One question per module; each runs by itself too: ``python -m bench.cycle --quick``.
"""
