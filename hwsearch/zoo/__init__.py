"""Small real tasks, used in the docs and the tests: `load("fashion_resnet")`.

======================  =================================  ===============================================
`fashion_resnet`        residual CNN                       Fashion-MNIST, in this package
`minilm`                transformer with a linear head     Reuters R8; `scripts/fetch_zoo minilm`
`efficientnet_lite0`    mobile CNN with ImageNet weights   photographs; `scripts/fetch_zoo efficientnet_lite0`
======================  =================================  ===============================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hwsearch.errors import InvalidInput

if TYPE_CHECKING:
    from hwsearch.task import Task

NAMES: tuple[str, ...] = ("fashion_resnet", "minilm", "efficientnet_lite0")


def load(name: str) -> Task:
    """The task called `name`; InvalidInput if there is none, or if it has not been fetched."""
    if name not in NAMES:
        raise InvalidInput(f"no task {name!r} in the zoo; it has {', '.join(NAMES)}")
    task: Task = importlib.import_module(f"hwsearch.zoo.{name}").load()
    return task
