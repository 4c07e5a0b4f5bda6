"""Pictures: a front, predicted against measured latency, one allocation layer by layer.

Every function returns a matplotlib Figure that no global state holds: it needs no display, and nobody must close it.
"""

from hwsearch.plot.allocation import plot_allocation
from hwsearch.plot.front import plot_front
from hwsearch.plot.predictions import plot_predictions

__all__ = ["plot_allocation", "plot_front", "plot_predictions"]
