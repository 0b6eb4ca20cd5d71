"""What the study compares: sets of shards, variants of the recipes, and tables of these."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

SHIFTS = ("fonts", "sizes", "damage")  # never trained on
MOVED = {f"moved-{step}": step for step in (0, 16, 4)}  # px: aligned pages, by moved.py
PAGES = ["--layout", "free", "--lookalikes", "1"]  # as many as it takes that pixel statistics tell little
SETS = {  # name -> what `vico shards glyphs` draws of them; none is of a seed of the base model
    "train": ["--num-samples", "12000", "--seed", "11", "--questions", "8", "--comparisons", "3"],
    "questions-1": ["--num-samples", "12000", "--seed", "11", "--questions", "1"],
    "questions-4": ["--num-samples", "12000", "--seed", "11"],
    "calibration": ["--num-samples", "2000", "--seed", "12"],
    "val": ["--num-samples", "500", "--seed", "13"],
    "pool": ["--num-samples", "4000", "--seed", "15"],  # to draw sets for calibration from
    **{name: ["--num-samples", "300", "--seed", "14", "--shift", name] for name in SHIFTS},
}
GENERATED = "generated"  # the images of `train` with the base model's own answers


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings that differ from the recipes, as `key=value`."""

    name: str
    data: str = "train"  # the set that all stages are trained on
    consistency: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    routed: tuple[str, ...] | None = None  # of stage 3 and another calibration, if they follow
    budget: float | None = None  # tokens at which tiles are routed in stage 3; default: what keeps 99 %
    # In this folder, with its first argument: takes the place of `vico` where the variant is not shared.
    script: str | None = None

    def folder_name(self, stage: str, seed: int) -> str:
        """Name the folder of a stage: the same for all variants that do the same up to it."""
        routed = (self.routed, self.budget)
        parts = {"consistency": self.consistency, "router": self.router, "start": routed, "routed": routed}
        until: list[object] = [self.data, *list(parts.values())[: list(parts).index(stage) + 1]]
        if stage != "consistency" and self.script is not None:
            until.append(self.script)
        digest = hashlib.sha256(json.dumps(until).encode()).hexdigest()[:8]
        return f"{stage}-{digest}-{seed}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Variants to compare, and what the comparison is about."""

    title: str
    variants: Sequence[Variant] = ()
    has_router: bool = True  # otherwise it compares what stage 1 makes, by arms that need no router


DEFAULT = Variant(name="default")
# Most tables compare shorter runs, so that a row takes about ten minutes.
QUARTER = ("trainer.max_steps=750",)  # of stage 1
FEWER = ("trainer.max_steps=1000",)  # of stage 2
RATIOS = "model.ratios=[4,16,64]"


def after_a_quarter(name: str, *settings: str) -> Variant:
    """Return a variant of stage 1."""
    return Variant(name=name, consistency=(*QUARTER, *settings))


def of_fewer_steps(name: str, *settings: str) -> Variant:
    """Return a variant of stage 2, with the stage 1 of the default."""
    return Variant(name=name, router=(*FEWER, *settings))


def short(name: str, *settings: str, data: str = "train") -> Variant:
    """Return a variant of both stages."""
    return Variant(name=name, data=data, consistency=(*QUARTER, *settings), router=(*FEWER, *settings))


TABLES = {
    "headline": Table(title="The default recipe", variants=[DEFAULT]),
    "baselines": Table(title="Other ways to spend fewer tokens"),
    "shift": Table(title="What stages 1 and 2 were not trained on"),
    "calibration": Table(title="How often a calibrated threshold keeps less than it promises"),
    "connectors": Table(
        title="How compressed connectors start",
        has_router=False,
        variants=[
            DEFAULT,
            after_a_quarter("a quarter of the steps"),
            after_a_quarter("a quarter, random weights", "model.connector_start=random"),
        ],
    ),
    "ratio_draw": Table(
        title="How stage 1 draws ratios (750 steps)",
        has_router=False,
        variants=[
            after_a_quarter("mixed"),
            after_a_quarter("image", "consistency.ratio_draw=image"),
            after_a_quarter("tile", "consistency.ratio_draw=tile"),
        ],
    ),
    "loss": Table(
        title="The loss of stage 1 (750 steps)",
        has_router=False,
        variants=[
            after_a_quarter("KL"),
            after_a_quarter("reverse KL", "consistency.reverse_kl=true"),
            after_a_quarter("temperature 2", "consistency.temperature=2.0"),
            after_a_quarter("cross-entropy", "consistency.cross_entropy=1.0"),
            after_a_quarter("KL and cross-entropy", "consistency.cross_entropy=0.5"),
        ],
    ),
    "labels": Table(
        title="The labels of stage 2 (1,000 steps)",
        variants=[
            of_fewer_steps("per tile, percentile 65"),
            of_fewer_steps("per image", "router.label_mode=image"),
            of_fewer_steps("tolerance", "router.label_rule=tolerance"),
            of_fewer_steps("soft targets", "router.label_softness=1.0"),
        ],
    ),
    "percentile": Table(
        title="The percentile of loss ratios below which a tile is to be compressed (1,000 steps)",
        variants=[
            *(of_fewer_steps(f"{k}", f"router.percentile={k}") for k in (30, 40, 50)),
            of_fewer_steps("65"),
            of_fewer_steps("80", "router.percentile=80"),
        ],
    ),
    "router": Table(
        title="A router that lets each patch know its neighbours",
        variants=[DEFAULT, Variant(name="with convolutions", script="routers.py convolution")],
    ),
    "router_size": Table(
        title="A smaller router",
        variants=[DEFAULT, Variant(name="a tenth of the weights", script="routers.py small")],
    ),
    "responses": Table(
        title="Whose responses, and how many questions per image (750 and 1,000 steps)",
        variants=[
            short("responses of the data, 8 questions per image"),
            short("answers of the base model", data=GENERATED),
            short("1 question per image", data="questions-1"),
            short("4 questions per image", data="questions-4"),
        ],
    ),
    "ratios": Table(
        title="Two ratios or three (750 and 1,000 steps)",
        variants=[short("4 and 16"), short("4, 16 and 64", RATIOS)],
    ),
    "routed": Table(
        title="Stage 3, training on what the router chooses",
        variants=[
            DEFAULT,
            Variant(name="with stage 3 at half of the tokens", routed=(), budget=0.5),
        ],
    ),
}
# Trained with cross-entropy, as long as the default, on images of at most so many tiles.
SMALLER = [
    Variant(
        name=f"smaller images, at most {tiles} {'tile' if tiles == 1 else 'tiles'}",
        consistency=(
            "consistency.ratio_draw=full",
            "consistency.cross_entropy=1.0",
            f"data.tiling.max_tiles={tiles}",
        ),
    )
    for tiles in (1, 2, 3)
]
NESTED = Variant(
    name="nested pooling (M3)",
    consistency=("stage=nested", "consistency.ratio_draw=image", "consistency.cross_entropy=1.0"),
    script="nested.py",
)
NAMED_ARMS = ("average_pooling", "fastv", "greedy_oracle")  # that a report has on request only
