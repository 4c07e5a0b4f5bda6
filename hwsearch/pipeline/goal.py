"""What a run with a floor is to find: how far the score may fall, and what is to be least. `99%`, `-0.5pt` and `0.93`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hwsearch.errors import InvalidInput

OBJECTIVES = ("latency", "size", "energy", "macs")
SAMPLES = 10
_EXAMPLES = "99% (of the dense score), -0.5pt (half a point below it) or 0.93"
_TEXT = re.compile(r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>%|pt|)\s*", re.I)


@dataclass(frozen=True)
class Floor:
    """The least that a score may be.

    Attributes:
        text: As it was written.
        kind: `%` (of the dense network's score), `pt` (hundredths below it, of a score from 0 to 1) or empty (a score).
        value: The number.
    """

    text: str
    kind: str
    value: float

    @staticmethod
    def parse(text: str | float) -> Floor:
        """A floor as it is written. Raises InvalidInput."""
        match = _TEXT.fullmatch(str(text))
        if match is None:
            raise InvalidInput(f"floor {str(text)!r} is malformed; expected {_EXAMPLES}")
        kind, value = match["unit"].lower(), float(match["number"])
        if not math.isfinite(value):
            raise InvalidInput(f"floor {str(text)!r} is out of range; expected {_EXAMPLES}")
        if kind == "%" and not 0 < value <= 100:
            raise InvalidInput(f"floor {str(text)!r} is no share of the dense score; expected above 0 %, at most 100 %")
        if kind == "pt" and not -100 < value <= 0:
            raise InvalidInput(f"floor {str(text)!r} is not below the dense score; expected points to lose, such as -0.5pt")
        return Floor(str(text).strip(), kind, value)

    def of(self, dense: float) -> float:
        """The least score, where the dense network has the score `dense`. Raises InvalidInput where it cannot be held or told."""
        if self.kind == "%":
            if dense <= 0:
                raise InvalidInput(f"a floor of {self.text} is of the dense score, which is {dense:.4g}; give a score instead")
            return dense * self.value / 100.0
        if self.kind == "pt":
            if not 0 <= dense <= 1:
                raise InvalidInput(
                    f"a floor of {self.text} is in hundredths of a score from 0 to 1, and the dense score is {dense:.4g}; give a "
                    "share such as 99%, or a score"
                )
            return dense + self.value / 100.0
        if self.value > dense:
            raise InvalidInput(f"the floor {self.text} is above the score of the dense network, {dense:.4g}; give a lower one")
        return self.value


@dataclass(frozen=True)
class Goal:
    """A floor, the cost that is to be least above it, and how many samples may be measured."""

    floor: Floor
    minimize: str = OBJECTIVES[0]
    samples: int = SAMPLES

    @staticmethod
    def of(floor: str | float | None, minimize: str | None, samples: int) -> Goal | None:
        """What was asked for; None without a floor. Raises InvalidInput."""
        if floor is None:
            if minimize is not None or samples != SAMPLES:
                raise InvalidInput(
                    "what is minimised, and in how many samples, goes with a floor on the score; give one, such as 99%, or leave "
                    "it out: under budgets alone a run finds the least loss"
                )
            return None
        if minimize is not None and minimize not in OBJECTIVES:
            raise InvalidInput(f"{minimize!r} cannot be minimised above a floor; expected one of {', '.join(OBJECTIVES)}")
        if samples < 1:
            raise InvalidInput(f"a floor is searched for in at least one sample, got {samples}")
        return Goal(Floor.parse(floor), minimize or OBJECTIVES[0], samples)
