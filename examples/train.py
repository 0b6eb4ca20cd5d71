"""Train both stages from Python, on a small set that is drawn here: two minutes on 2 CPU cores.

    python examples/train.py runs/example

The same call again resumes what was interrupted; a finished stage is not repeated.
"""

import sys
from pathlib import Path

from vico_pl.data.glyphs import GlyphsConfig
from vico_pl.data.shards.build import build_glyphs
from vico_pl.prepare import is_finished, prepare_run
from vico_pl.trainer import train


def main(folder: str = "runs/example", *settings: str) -> Path:
    run, shards = Path(folder), Path(folder) / "shards"
    for part, num_samples, seed in (("train", 400, 1), ("held-out", 32, 2)):
        build_glyphs(shards / part, GlyphsConfig(), num_samples=num_samples, seed=seed, samples_per_shard=200)
    held_out = f"data.validation=[{{name: held_out, path: {shards / 'held-out'}}}]"
    common = [
        f"data.sources=[{{path: {shards / 'train'}}}]",
        held_out,
        "trainer.checkpoint_every=20",
        "data.num_workers=0",
    ]

    # Stage 1: the policy learns to answer with few vision tokens as the reference does with all of them.
    consistency = [f"run_dir={run / 'consistency'}", "trainer.max_steps=100", *common, *settings]
    policy = train_stage("recipes/demo/consistency.yaml", consistency)

    # Stage 2: with all else frozen, the router learns which tiles may be compressed.
    router = [f"run_dir={run / 'router'}", f"model.path={policy}", "trainer.max_steps=40", *common, *settings]
    return train_stage("recipes/demo/router.yaml", router)


def train_stage(recipe: str, settings: list[str]) -> Path:
    """Train a recipe with `key=value` settings, or resume it; returns the folder of its model."""
    config = prepare_run(Path(recipe), settings)
    if not is_finished(Path(config.run_dir)) and train(config) is None:
        raise SystemExit(f"{config.run_dir} was stopped and has saved its state; the same call resumes it")
    print(f"{config.run_dir}/model is written")
    return Path(config.run_dir) / "model"


if __name__ == "__main__":
    main(*sys.argv[1:])
