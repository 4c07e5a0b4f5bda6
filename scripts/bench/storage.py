"""Predicted against true bytes of the deployed file, and the score, with every layer in one variant: fp32, int8, stored in int8.

    python scripts/bench/storage.py zoo:minilm
"""

from __future__ import annotations

import argparse

import hwsearch as hs
from hwsearch import backends
from hwsearch.deployment.evaluate import predictor, score
from hwsearch.engine.record import graph_bytes
from hwsearch.engine.setup import set_up
from hwsearch.network.variants import STORAGE, Variant, legal, weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--backend", default="openvino")
    given = parser.parse_args()
    for spec in given.tasks:
        task = hs.load(spec)
        setup = set_up(task, backends.get(given.backend), base="fp32", axes=["storage"])
        always, own = graph_bytes(setup, "fp32")
        for variant in (Variant("fp32"), Variant("int8"), STORAGE):
            chosen = {u.name: (*legal(u, [variant]), Variant("fp32"))[0] for u in setup.network.units}
            units = sum(weight_bytes(u, chosen[u.name]) + own[u.name][str(chosen[u.name])] for u in setup.network.units)
            predicted = always + setup.network.fixed_bytes + units
            engine, model = setup.build(chosen)
            size, found = model.ByteSize(), score(task, predictor(setup.lowering, engine), str(variant))
            print(
                f"{spec} {variant}: {predicted:,} bytes predicted, {size:,} in the file ({predicted / size - 1:+.2%}), "
                f"score {found:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
