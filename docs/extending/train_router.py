"""Train stage 2 with the router of router.py: train_router.py MODEL_OF_STAGE_1 RUN_FOLDER [key=value ...]."""

import shutil
import sys
from pathlib import Path

from router import choose_router

from vico_pl.prepare import prepare_run
from vico_pl.trainer import train


def main(model: str, run: str, *settings: str) -> Path | None:
    policy = shutil.copytree(model, f"{run}-policy")  # the folder of stage 1 stays as it is
    choose_router(Path(policy), "mean")
    recipe = Path("recipes/demo/router.yaml")
    return train(prepare_run(recipe, [f"model.path={policy}", f"run_dir={run}", *settings]))


if __name__ == "__main__":
    print(main(*sys.argv[1:]), "is written")
