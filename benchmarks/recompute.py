"""Step time and activations of each policy of train.recompute.

    python benchmarks/recompute.py [--rounds 5]

The model and step of benchmarks/training.py in fp32; policies alternate in one run, medians are
printed. Bytes of activations are those that `megarecur check` prints.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from training import make_config, our_step, seconds

from megarecur.config.train import TrainConfig
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.schemes import layer_map

POLICIES: dict[str, Any] = {
    "none": "none",
    "selective": "selective",
    "loops: [0]": {"loops": [0]},
    "full": "full",
}


def main() -> None:
    """Print a row per policy."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    base, steps, sizes = make_config("fp32"), {}, {}
    for name, policy in POLICIES.items():
        train = TrainConfig.model_validate({**base.train.model_dump(), "recompute": policy})
        config = base.model_copy(update={"train": train})
        steps[name] = our_step(config)
        sizes[name] = estimate_memory(config, layer_map(config.recurrence)).activations
    losses = {step() for step in steps.values()}
    assert len(losses) == 1, f"policies differ: {losses}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    for name in steps:
        ratio = statistics.median(
            own / none for own, none in zip(times[name], times["none"], strict=True)
        )
        size = sizes[name] / 2**20
        print(f"{name:11} {size:7.0f} MiB  {ratio:.2f} of the time of none", flush=True)


if __name__ == "__main__":
    main()
