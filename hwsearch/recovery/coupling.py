"""How weights are led to what an allocation allows: what each step of training does beside following the gradient.

`ste` and `mask` train the network at its widths. `ste` multiplies with rounded weights, straight-through; `mask` with free ones,
which are rounded when they are judged and deployed. Both keep N:M patterns: their support is fixed at the start. `srste` (Zhou et
al. 2021) finds the support anew in each step, from all weights, and pulls those outside of it towards zero. `lc` (Condensa, Joseph
et al. 2020) trains free weights w beside rounded ones, bound by an augmented Lagrangian: what is judged and deployed are the
rounded ones. For widths, `shrink` (HESSO's ramp) and `halfspace` (HSPG, Chen et al. 2021) train the whole network
first and bring what reads the removed channels to exact zero; then channels are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from hwsearch.compress.patterns import nm_mask
from hwsearch.compress.widths import Kept
from hwsearch.recovery.student import CPU, Student, moved

METHODS = ("ste", "mask", "lc", "srste", "shrink", "halfspace")
PULL = 2e-4
"""Of `srste`: the paper's, for any network."""
HALF_SPACE, LAMBDA = 0.0, 1e-3
"""Of `halfspace`: how far beyond a right angle a step has to turn a group for it to become zero, and the penalty's weight."""
PASSES, MU, LAST_MU = 12, 0.05, 2.0
"""Of `lc`: C steps, and the penalty at the first and at the last of them, in units of the mean curvature."""
TUNED = 0.3
"""Of `lc`, where a scheme is trained: the last share of the steps, in which what is kept is fixed."""


class Projection(Protocol):
    """What is allowed beside widths: weights of layers that are led to it, by the names of units."""

    @property
    def units(self) -> Sequence[str]:
        """Units whose weights it changes."""

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The nearest allowed weight of each of `units`."""

    def supports(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which weights may be other than zero, of units where not all may; shapes as of the weights."""


class Coupling:
    """Follows the gradient and keeps the support of patterns. rounds: whether units multiply with rounded weights."""

    rounds = False

    def __init__(self, student: Student) -> None:
        self.student = student
        self.supports = _supports(student)
        self.flips: list[float] = []
        """Of each step, the share of weights that entered or left a support; empty where supports are fixed."""

    def gradients(self, samples: int) -> None:
        """After the backward pass of a batch of so many: none outside of a support, and so none in the optimizer's moments."""
        for path, mask in self.supports.items():
            gradient = self.student.tensors[path].grad
            if gradient is not None:
                gradient.mul_(mask)

    def stepped(self, step: int, steps: int, rate: float) -> None:
        """After the optimizer's step, the `step`-th (from 0) of so many."""
        with torch.no_grad():
            for path, mask in self.supports.items():
                self.student.tensors[path].mul_(mask)

    def answer(self) -> dict[str, torch.Tensor]:
        """What is judged and deployed."""
        return self.student.answer()

    def state(self) -> dict[str, torch.Tensor]:
        """What goes into a checkpoint beside weights and the optimizer."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state`."""


class StraightThrough(Coupling):
    """`ste`."""

    rounds = True


class SparseRefined(Coupling):
    """`srste`: supports found anew in each step; what is outside decays, apart from the optimizer, whose moments would scale it."""

    rounds = True

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        self._before, self.supports = self.supports, {}

    def stepped(self, step: int, steps: int, rate: float) -> None:
        now = _supports(self.student)
        with torch.no_grad():
            for path, mask in now.items():
                self.student.tensors[path].sub_(rate * PULL * ~mask * self.student.tensors[path])
        flipped = sum(int((now[p] ^ self._before[p]).sum()) for p in now)
        self.flips.append(flipped / max(1, sum(m.numel() for m in now.values())))
        self._before = now

    def state(self) -> dict[str, torch.Tensor]:
        return {"flips|": torch.tensor(self.flips, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self._before = _supports(self.student)  # the pull, which came after them, changes none
        self.flips = state["flips|"].tolist() if state else []  # files of before have none


class Lagrangian:
    """w and theta bound by an augmented Lagrangian: L(w) - lambda (w - theta) + mu/2 |w - theta|^2.

    project: the nearest that the allocation allows. An L step makes w follow `pull`; a C step projects, and then updates lambda.
    """

    def __init__(
        self, w: Mapping[str, torch.Tensor], project: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]], mu: float
    ) -> None:
        self.project, self.mu = project, mu
        self.theta = project(w)
        self.multipliers = {k: torch.zeros_like(v) for k, v in self.theta.items()}

    def pull(self, w: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the two terms add to the gradient of w."""
        return {k: self.mu * (w[k] - self.theta[k]) - self.multipliers[k] for k in self.theta}

    def compress(self, w: Mapping[str, torch.Tensor], growth: float) -> None:
        """A C step: theta, then the multipliers, then a larger penalty."""
        self.theta = self.project({k: w[k] - self.multipliers[k] / self.mu for k in self.theta})
        for k, own in self.multipliers.items():
            own -= self.mu * (w[k] - self.theta[k])
        self.mu *= growth


class Rounded:
    """The projection of an allocation: weights rounded as units store them."""

    def __init__(self, student: Student) -> None:
        self.student, paths = student, student.lowering.traced.paths
        self.units = [u for u, v in student.variants.items() if not v.plain and paths[u][0] in student.home]

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {unit: self.student.rounded_weight(unit, weights[unit]) for unit in self.units}

    def supports(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """None: weights of a pattern are free between its C steps."""
        return {}


class Projecting(Coupling):
    """`mask` for a projection: free weights on a fixed support; what is judged and deployed are projected ones."""

    def __init__(self, student: Student, projection: Projection, *, fixed: bool = True) -> None:
        super().__init__(student)
        self.projection = projection
        paths = student.lowering.traced.paths
        self.homes = {unit: student.home[str(paths[unit][0])] for unit in projection.units}
        self.supports = {}
        if fixed:
            self._fix(self._free())

    def _fix(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Fix the supports that these weights have, by homes."""
        found = self.projection.supports(self._by_unit(weights))
        self.supports = {self.homes[unit]: moved(mask, self.student.device) for unit, mask in found.items()}
        with torch.no_grad():
            for home, mask in self.supports.items():
                self.student.tensors[home].mul_(mask)

    def _by_unit(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {unit: moved(weights[home], CPU) for unit, home in self.homes.items()}

    def _project(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By homes, of what is given by homes."""
        found = self.projection(self._by_unit(weights))
        return {self.homes[unit]: moved(weight, self.student.device) for unit, weight in found.items()}

    def _free(self) -> dict[str, torch.Tensor]:
        return {home: self.student.tensors[home].detach() for home in self.homes.values()}

    def allowed(self) -> dict[str, torch.Tensor]:
        """The projected weights, by homes."""
        return self._project(self._free())

    @contextmanager
    def _in_place(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = {home: self.student.tensors[home].detach().clone() for home in tensors}
        try:
            with torch.no_grad():
                for home, value in tensors.items():
                    self.student.tensors[home].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for home, value in own.items():
                    self.student.tensors[home].copy_(value)

    def answer(self) -> dict[str, torch.Tensor]:
        allowed, units = self.allowed(), {home: unit for unit, home in self.homes.items()}
        with self._in_place(allowed):
            found = self.student.answer()
        return found | {h: t.clone() for h, t in allowed.items() if units[h] not in self.student.norms}


class LearningCompression(Projecting):
    """`lc`: mu is in units of the mean curvature, for which the mean diagonal of the Fisher matrix stands.

    passes: C steps. Weights are free from the first step on, those of the dense network where a scheme is trained. What a scheme
    keeps in the last C step is then trained on its own, as by `mask`, for the last `TUNED` of the steps.
    """

    def __init__(self, student: Student, projection: Projection, passes: int = PASSES) -> None:
        super().__init__(student, projection, fixed=False)
        self.passes, self.tunes, self.tuning = passes, not isinstance(projection, Rounded), False
        self.growth = (LAST_MU / MU) ** (1 / max(1, passes - 1))
        self.curvature, self.seen = 0.0, 0
        self.bound = Lagrangian(self._free(), self._project, MU)

    def allowed(self) -> dict[str, torch.Tensor]:
        return super().allowed() if self.tuning else self.bound.theta

    def gradients(self, samples: int) -> None:
        if self.tuning:
            super().gradients(samples)
            return
        own = {home: self.student.tensors[home].grad for home in self.homes.values()}
        if not own:
            return
        squared = [float(g.square().mean()) for g in own.values() if g is not None]
        fisher = samples * float(np.mean(squared))
        self.curvature = (self.curvature * self.seen + fisher) / (self.seen + 1)
        self.seen += 1
        for path, pull in self.bound.pull(self._free()).items():
            gradient = own[path]
            if gradient is not None:
                gradient.add_(pull, alpha=self.curvature)

    def stepped(self, step: int, steps: int, rate: float) -> None:
        if self.tuning:
            super().stepped(step, steps, rate)
            return
        free = steps - round(TUNED * steps) if self.tunes else steps
        each = max(1, free // self.passes)
        if self.homes and (step + 1) % each == 0:
            self.bound.compress(self._free(), self.growth)
        if self.tunes and step + 1 >= free:
            self._tune()

    def _tune(self) -> None:
        """Fix what the last C step kept."""
        self.tuning = True
        self._fix({h: w - self.bound.multipliers[h] / self.bound.mu for h, w in self._free().items()})

    def state(self) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([self.bound.mu, self.curvature, float(self.seen), float(self.tuning)], dtype=torch.float64)
        parts = {"theta": self.bound.theta, "multiplier": self.bound.multipliers, "support": self.supports}
        return {"numbers|": numbers} | {f"{name}|{k}": v for name, own in parts.items() for k, v in own.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.bound.mu, self.curvature, seen, *tuning = state["numbers|"].tolist()
        self.seen, self.tuning = int(seen), bool(tuning and tuning[0])  # files of before have no tuning
        for k in self.bound.theta:
            self.bound.theta[k], self.bound.multipliers[k] = state[f"theta|{k}"], state[f"multiplier|{k}"]
        self.supports = {k.removeprefix("support|"): v for k, v in state.items() if k.startswith("support|")}


class Fading(Coupling):
    """Of the whole network: brings to zero what reads the channels that go. `shrink` multiplies it, linearly down to zero.

    Where all of that is zero, the whole network computes what the narrow one does.
    """

    def __init__(self, student: Student, kept: Kept) -> None:
        super().__init__(student)
        self.removed = _readers(student, kept)
        self.faded: dict[str, torch.Tensor] = {}
        for path, mask in self.removed:
            self.faded[path] = self.faded.get(path, torch.zeros_like(mask)) | mask

    def stepped(self, step: int, steps: int, rate: float) -> None:
        super().stepped(step, steps, rate)
        left = (steps - step - 1) / (steps - step)
        with torch.no_grad():
            for path, mask in self.faded.items():
                self.student.tensors[path].mul_(torch.where(mask, left, 1.0))


class HalfSpace(Fading):
    """`halfspace`: a group becomes zero for good once a step, with a penalty on its norm, would turn it around."""

    def __init__(self, student: Student, kept: Kept) -> None:
        super().__init__(student, kept)
        self.before: dict[str, torch.Tensor] = {}

    def gradients(self, samples: int) -> None:
        super().gradients(samples)
        self.before = {}
        with torch.no_grad():
            for path, mask in self.removed:
                own = self.student.tensors[path]
                self.before.setdefault(path, own.detach().clone())
                norm = (own * mask).norm()
                if own.grad is not None and float(norm) > 0:
                    own.grad.add_(own * mask, alpha=LAMBDA / float(norm))

    def stepped(self, step: int, steps: int, rate: float) -> None:
        Coupling.stepped(self, step, steps, rate)
        with torch.no_grad():
            for path, mask in self.removed:
                own, before = self.student.tensors[path], self.before[path]
                old = before * mask
                turned = (own * old).sum() < HALF_SPACE * old.square().sum() or not bool(old.any())
                if turned or step == steps - 1:
                    own.masked_fill_(mask, 0.0)


def _supports(student: Student) -> dict[str, torch.Tensor]:
    """Which weights of units in N:M patterns stay, by where they are."""
    found = {}
    for unit, variant in student.variants.items():
        path = student.lowering.traced.paths[unit][0]
        if variant.kept is not None and path in student.home:
            weight = student.tensors[student.home[path]]
            found[student.home[path]] = nm_mask(weight, student.lowering.traced.network[unit].in_axis, *variant.kept)
    return found


def _readers(student: Student, kept: Kept) -> list[tuple[str, torch.Tensor]]:
    """(where a weight is, which of it reads one slot that goes), for each such slot; shapes broadcast."""
    traced = student.lowering.traced
    mask = traced.channels.mask(kept)
    found: list[tuple[str, torch.Tensor]] = []
    for path, axis in dict.fromkeys(traced.reads()):
        for own in traced.channels.tensors.get(path, []):
            if own.axis != axis or path not in student.home:
                continue
            home = student.home[path]
            shape = [-1 if d == axis else 1 for d in range(student.tensors[home].dim())]
            gone = np.unique(own.slots[~mask[own.slots]])
            found += [(home, torch.from_numpy(own.slots == slot).reshape(shape).to(student.device)) for slot in gone]
    return found


def coupling(
    method: str, student: Student, kept: Kept | None = None, *, projection: Projection | None = None, passes: int = PASSES
) -> Coupling:
    """By name. kept: where a whole network is led to fewer channels, those that stay. projection: of a scheme."""
    if kept is not None:
        return {"shrink": Fading, "halfspace": HalfSpace}[method](student, kept)
    if method == "lc":
        return LearningCompression(student, projection or Rounded(student), passes)
    if projection is not None:
        return Projecting(student, projection)
    kinds: dict[str, Any] = {"mask": Coupling, "srste": SparseRefined}
    made: Coupling = kinds.get(method, StraightThrough)(student)
    return made
