"""Random histories of a family of processes, run on a real server through a proxy, against a model."""

from histories.history import History
from histories.stage import HistoryFailed, Stage

__all__ = ["History", "HistoryFailed", "Stage"]
