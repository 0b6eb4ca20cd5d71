"""Host memory of the first rank while two ranks save sharded weights and their Adam state.

Each rank writes its part; the other way is to gather everything on the first rank for a single file. Both run
in two processes on gloo; a peak is over memory before saving, and relative to the part of a rank.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Goal

RANKS, LAYERS, WIDTH = 2, 8, 2896
GOALS = {"checkpoint_rank0_peak_over_shard": Goal(0.25), "checkpoint_gathered_peak_over_shard": None}
WAYS = {
    "a part per rank": "checkpoint_rank0_peak_over_shard",
    "one file": "checkpoint_gathered_peak_over_shard",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both ways and write the results."""
    parser = harness.parser("Measure the host memory of saving a sharded checkpoint.")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--measure", choices=WAYS)
    given = parser.parse_args(arguments)
    if given.measure is not None:
        sys.stdout.write(json.dumps(measure(given.measure, given.width)))
        return
    script = Path(__file__)
    measured = {way: harness.measure_apart(script, way, f"--width={given.width}") for way in WAYS}
    details = {"parameters": LAYERS * given.width**2, "ways": measured}
    harness.publish(
        "checkpoints",
        given,
        figures=figures(measured),
        details=details,
        tables=tables,
        packages=["lightning"],
    )


def measure(way: str, width: int) -> dict[str, float]:
    """Save once with two ranks; return what the first measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_save, args=(r, port, way, width, folder)) for r in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]}")
        found: dict[str, float] = json.loads((Path(folder) / "measured.json").read_text())
    return found


def _save(rank: int, port: int, way: str, width: int, folder: str) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in {**address, "WORLD_SIZE": RANKS}.items()}
    import lightning as L
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from vico_pl.callbacks.checkpoints import AtomicCheckpointIO
    from vico_pl.callbacks.sharded import ShardedStrategy

    class Layers(L.LightningModule):
        """A model of nothing but matrices."""

        def configure_model(self) -> None:
            if not hasattr(self, "layers"):
                layers = [torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
                self.layers = torch.nn.Sequential(*map(fully_shard, layers))
                fully_shard(self)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    sizes = {"data_parallel_size": RANKS, "tensor_parallel_size": 1}
    one_file = partial(ModelParallelStrategy, save_distributed_checkpoint=False)
    strategy = (ShardedStrategy if way == "a part per rank" else one_file)(**sizes)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )

    class Save(L.Callback):
        """Saves after the step, while the trainer's state is complete."""

        def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_: Any) -> None:
            part = sum(p.to_local().nbytes for p in stage.parameters())  # type: ignore[attr-defined]
            found = harness.measure(lambda: trainer.save_checkpoint(Path(folder) / "step.ckpt"))
            if rank == 0:
                shard = {"shard_mib": 3 * part / 2**20}  # weights and both means of Adam
                (Path(folder) / "measured.json").write_text(json.dumps({**found, **shard}))

    trainer.callbacks.append(Save())  # type: ignore[attr-defined]
    trainer.fit(Layers(), torch.utils.data.DataLoader(torch.ones(4, width), batch_size=2))


def figures(measured: dict[str, dict[str, float]]) -> harness.Figures:
    """Return each figure with its goal."""
    found = {WAYS[way]: m["peak_mib"] / m["shard_mib"] for way, m in measured.items()}
    return harness.figures_of(found, GOALS)


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    rows = [
        f"| {way} | {found['shard_mib']:.0f} | {found['peak_mib']:.0f} | {found['cpu_s']:.1f} |"
        for way, found in content["ways"].items()
    ]
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        "| two ranks save | part of a rank, MiB | peak of rank 0 above it, MiB | processor s |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
