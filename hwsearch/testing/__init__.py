"""For tests of backends and of what stands above them.

`BackendContract` is inherited by the test of every backend; `SimulatedBackend` is a device with a known latency law.
"""

from hwsearch.testing.contract import BackendContract
from hwsearch.testing.simulated import LatencyLaw, SimulatedBackend, SimulatedEngine, sizes_of

__all__ = ["BackendContract", "LatencyLaw", "SimulatedBackend", "SimulatedEngine", "sizes_of"]
