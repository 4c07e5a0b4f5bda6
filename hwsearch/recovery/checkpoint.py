"""The state of a training on disk: one safetensors file, put in place in one step, without anything that is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from hwsearch.files import changed, write_bytes
from hwsearch.recovery.processes import Processes

SCHEMA = "hwsearch.training/1"


@dataclass
class State:
    """All that the next step depends on.

    Attributes:
        step: Steps done.
        numbers: Of the loop, as JSON.
        tensors: By name: weights, the optimizer's moments, the best weights, torch's random numbers.
    """

    step: int
    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)


class Checkpoint:
    """A file that a training goes on from; of several processes the main one writes and reads it.

    made_of: all that its steps depend on, by name; another one is not gone on with.
    """

    def __init__(self, path: str | Path, made_of: Mapping[str, str], processes: Processes | None = None) -> None:
        self.path, self.made_of, self.processes = Path(path), dict(made_of), processes or Processes()
        self.differs = ""
        """Why the file that is there is not gone on with; empty where it is, or there is none."""

    def save(self, state: State) -> None:
        """Write the file."""
        if not self.processes.main:
            return
        header = {
            "schema": SCHEMA,
            "made_of": json.dumps(self.made_of),
            "step": str(state.step),
            "numbers": json.dumps(state.numbers),
        }
        write_bytes(self.path, save({k: t.detach().contiguous().clone() for k, t in state.tensors.items()}, header))

    def load(self) -> State | None:
        """What an earlier process left; None where that is nothing, damaged, or of another training."""
        state, self.differs = self.processes.of_main(lambda: (self._read(), self.differs))
        return state

    def _read(self) -> State | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
            if header["schema"] != SCHEMA:
                self.differs = f"it has schema {header['schema']}"
                return None
            if differs := changed(json.loads(header["made_of"]), self.made_of):
                self.differs = f"it is of other {differs}"
                return None
            return State(int(header["step"]), dict(json.loads(header["numbers"])), load_file(self.path))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self.differs = f"it is damaged ({error})"
            return None

    def remove(self) -> None:
        """The training is done."""
        if self.processes.main:
            self.path.unlink(missing_ok=True)
