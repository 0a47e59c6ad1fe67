"""What the encoding of a set owes to the partition it came in: nothing after UMBC, SSE and DeepSets, much otherwise.

    python -m benchmarks.partitions [--full] [--picture PATH]

Every model of amortized clustering, with its initial weights, is shown one set of points in random partitions, in float64;
the figure is the variance of what it says of the set, averaged over the entries. 256 points in 30 partitions; ``--full``:
1,024 in 100, as figure 3 of Willette et al. 2023 (https://arxiv.org/abs/2208.12401).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import report, table
from distset.data.synthetic_mixtures import MixtureSets
from distset.encoders import ChunkEncoder
from distset.report.set_figures import plot_variances
from distset.seeds import seeded
from distset.tasks import clustering_models as models
from distset.tasks.set_models import SetModel, partition_variance

MODELS: dict[str, Callable[..., tuple[ChunkEncoder, nn.Module]]] = {
    "UMBC + Set Transformer": models.umbc_set_transformer,
    "UMBC + FSPool": models.umbc_fspool,
    "UMBC + DiffEM": models.umbc_diffem,
    "SSE": models.sse,
    "SSE, hierarchical": models.hierarchical_sse,
    "DeepSets": models.deepsets,
    "Set Transformer": models.set_transformer,
    "FSPool": models.fspool,
    "DiffEM": models.diffem,
}

ALONE = ("Set Transformer", "FSPool", "DiffEM")
"""Models that are not mini-batch consistent."""


def variances(*, points: int = 1024, partitions: int = 100, seed: int = 0) -> dict[str, float]:
    """The variance over partitions, by model."""
    elements = torch.from_numpy(MixtureSets(1, size=points, seed=seed).draw(0).points).double()
    found = {}
    for name, maker in MODELS.items():
        with seeded(seed, torch.device("cpu")):
            encoder, head = maker(2, 4)
        model = SetModel(encoder, head).double().eval()
        found[name] = partition_variance(functools.partial(model, seed=0), elements, partitions=partitions, seed=seed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="1,024 points in 100 partitions")
    parser.add_argument("--picture", type=Path, help="a PNG with a bar for each model")
    args = parser.parse_args()
    found = variances() if args.full else variances(points=256, partitions=30)
    table([{"model": name, "variance": f"{variance:.1e}"} for name, variance in found.items()], title="over partitions")
    if args.picture:
        plot_variances(found, args.picture)
    alone = [variance for name, variance in found.items() if name in ALONE]
    composed = [variance for name, variance in found.items() if name not in ALONE]
    bars = {
        "largest variance with UMBC, of SSE and DeepSets": (max(composed), "<=", 1e-24),
        "least variance without": (min(alone), ">=", 1e-9),
    }
    return report("partitions", dict(found), bars)


if __name__ == "__main__":
    raise SystemExit(main())
