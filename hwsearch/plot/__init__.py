"""Pictures: a front, predicted against measured latency, one allocation layer by layer, a staircase of
widths, the errors of a model, the course of a recovery, the samples of a scheme.

Every function returns a matplotlib Figure that no global state holds: it needs no display, and nobody must close it.
"""

from hwsearch.plot.allocation import plot_allocation
from hwsearch.plot.diagnosis import plot_diagnosis
from hwsearch.plot.front import plot_front, plot_fronts
from hwsearch.plot.knobs import plot_bayes
from hwsearch.plot.predictions import plot_predictions
from hwsearch.plot.recovery import plot_recovery
from hwsearch.plot.staircase import plot_staircase

__all__ = [
    "plot_allocation", "plot_bayes", "plot_diagnosis", "plot_front", "plot_fronts", "plot_predictions", "plot_recovery",
    "plot_staircase",
]  # fmt: skip
