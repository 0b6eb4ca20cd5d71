"""Cost of a step of stage 1 against a plain one, and its growth with the samples.

Both steps take the same model, samples and ratios. The plain one pads every sample to the longest and
computes logits at every position.
"""

import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import harness
import torch
from harness import Goal
from models import Text, draw_batch, draw_sample, random_model, spec_of
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence

from vico_pl.data.collate import collate
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch

GOALS = {
    "step_time_over_naive": Goal(0.55),
    "step_loss_difference": Goal(1e-4),
} | {
    f"scaling_{quantity}_{what}": Goal(1.15)
    for what in ("tiles", "response", "vocabulary")
    for quantity in ("time", "memory")
}
SHAPE = {
    "tile_size": 224,  # 64 or 16 vision tokens
    "vision": {"width": 256, "layers": 3},
    "language": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "heads": (4, 2)},
    "vocab_size": 16_384,
}
TINY = {
    "tile_size": 56,
    "vision": {"width": 64, "layers": 1},
    "language": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "heads": (1, 1)},
    "vocab_size": 64,
}
TILES = (1, 3, 5, 7, 10, 13)  # of the samples of a step
ROUNDS = 7
# What grows, one at a time; the rest stays at `USUAL`.
USUAL = {"tiles": 5, "response": 100, "vocabulary": 4096}
SWEEPS = {
    "tiles": (1, 4, 7, 10, 13),
    "response": (16, 1024, 2048, 4096),
    "vocabulary": (4096, 32_768, 65_536, 131_072),
}


# --- The two steps ------------------------------------------------------------------------------------------


class Steps:
    """A policy, the reference it started from, a batch, and a ratio for each tile, drawn once."""

    def __init__(self, batch: Batch, **changes: Any) -> None:
        """Build the inputs of both steps."""
        spec = spec_of(**{**SHAPE, **changes})
        self.policy, self.original = random_model(spec, seed=1), random_model(spec, seed=2)
        self.policy.router.requires_grad_(requires_grad=False)
        self.reference, self.batch = FrozenReference(self.original), batch
        generator = torch.Generator().manual_seed(0)
        self.ratios = torch.tensor([4, 16])[torch.randint(2, (batch.num_tiles,), generator=generator)]

    def ours(self) -> Tensor:
        """Run the step of stage 1: packed, heads on response tokens only."""
        states = self.policy.response_states(
            self.batch, self.policy.encode_tiles(self.batch.tiles), self.ratios
        )
        wanted = self.reference.response_states(self.batch)
        kl = consistency_kl(states, self.policy.head, wanted, self.reference.head)
        return self._backward(kl)

    def plain(self) -> Tensor:
        """Run the same step with padding and whole logits."""
        logits = padded_logits(self.policy, self.batch, self.ratios)
        with torch.no_grad():
            wanted = padded_logits(self.original, self.batch, self.reference.model.full_ratios(self.batch))
        log_q, log_p = log_softmax(logits, -1), log_softmax(wanted, -1)
        return self._backward(kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))

    def _backward(self, kl: Tensor) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        loss = kl.mean()
        loss.backward()
        return loss.detach()


def padded_logits(model: VisionLanguageModel, batch: Batch, ratios: Tensor) -> Tensor:
    """Return the logits that predict the response, from rows padded on the right."""
    spliced = model.splice_batch(batch, model.encode_tiles(batch.tiles), ratios)
    lengths = spliced.segment_lengths
    rows = pad_sequence(list(spliced.embeddings.split(lengths)), batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    model.language.set_attn_implementation("sdpa")
    logits = model.language(inputs_embeds=rows, attention_mask=mask.long(), use_cache=False).logits
    return logits[mask][spliced.response_positions]  # rows end to end again


# --- What is measured ---------------------------------------------------------------------------------------


def usual_batch() -> Batch:
    """Draw the samples of a step: 1 to 13 tiles, responses of 20 to 120 tokens."""
    texts = [Text(system=20, question=30 + 10 * i, response=20 * (1 + i)) for i in range(len(TILES))]
    order = (3, 0, 5, 1, 4, 2)  # long answers are not those to the largest images
    spec = spec_of(**SHAPE)
    return collate(
        [draw_sample(spec, tiles=n, text=texts[i], seed=i) for n, i in zip(TILES, order, strict=True)]
    )


def swept_steps(what: str, size: int) -> Steps:
    """Build a step of one sample with one size changed."""
    sizes = {**USUAL, what: size}
    changes = {"vocab_size": sizes["vocabulary"]}
    spec = spec_of(**{**SHAPE, **changes})
    return Steps(draw_batch(spec, [sizes["tiles"]], Text(response=sizes["response"])), **changes)


def measure(name: str) -> dict[str, float]:
    """Run one step: `ours` or `plain` on the usual batch, or as `tiles=7`."""
    torch.set_num_threads(1)
    what, _, size = name.partition("=")
    Steps(draw_batch(spec_of(**TINY), [1]), **TINY).ours()  # loads what is loaded at the first use
    steps = swept_steps(what, int(size)) if size else Steps(usual_batch())
    run = steps.plain if name == "plain" else steps.ours
    first, again = harness.measure(run), harness.measure(run)
    return {"cpu_s": min(first["cpu_s"], again["cpu_s"]), "peak_mib": first["peak_mib"]}


def measure_pair(steps: Steps, *, rounds: int) -> dict[str, Any]:
    """Time both steps alternately and compare their losses."""
    ours, plain = steps.ours().item(), steps.plain().item()
    times = harness.paired(steps.ours, steps.plain, rounds=rounds, warm_up=False)
    return {"loss_difference": abs(ours / plain - 1), "cpu_s": times}


def over_line(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the largest excess over the line through the first and last values.

    >>> over_line([1, 2, 3], [10.0, 22.0, 30.0])
    1.1
    """
    slope = (values[-1] - values[0]) / (sizes[-1] - sizes[0])
    line = [values[0] + slope * (size - sizes[0]) for size in sizes]
    return max(value / wanted for value, wanted in zip(values, line, strict=True))


def figures(details: dict[str, Any]) -> harness.Figures:
    """Return each figure with its goal."""
    measured = {
        "step_time_over_naive": harness.median_ratio(details["pair"]["cpu_s"]),
        "step_loss_difference": details["pair"]["loss_difference"],
    }
    for what, points in details["scaling"].items():
        for quantity, key in (("time", "cpu_s"), ("memory", "peak_mib")):
            values = [point[key] for point in points.values()]
            measured[f"scaling_{quantity}_{what}"] = over_line([*map(int, points)], values)
    return harness.figures_of(measured, GOALS)


def tables(details: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    ours, plain = (median(times) for times in zip(*details["pair"]["cpu_s"], strict=True))
    memory = details["memory"]
    rows = [
        f"| {what} | {size} | {point['cpu_s']:.2f} s | {point['peak_mib']:.0f} MiB |"
        for what, points in details["scaling"].items()
        for size, point in points.items()
    ]
    lines = [
        *harness.heading(details),
        *harness.figure_table(details["figures"], GOALS),
        f"| a step of {len(TILES)} samples with {TILES[0]} to {TILES[-1]} tiles | ours | plain |",
        "|---|---|---|",
        f"| processor time | {ours:.2f} s | {plain:.2f} s |",
        f"| memory above model and samples | {memory['ours']['peak_mib']:.0f} MiB "
        f"| {memory['plain']['peak_mib']:.0f} MiB |",
        "",
        "| a step of one sample, by | of | processor time | memory above model and sample |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one measurement, or all and write the results."""
    parser = harness.parser("Measure a step of stage 1.")
    parser.add_argument("--measure", help="one step in this process, as JSON: ours, plain, tiles=7")
    given = parser.parse_args(arguments)
    if given.measure:
        sys.stdout.write(json.dumps(measure(given.measure)))
        return
    torch.set_num_threads(1)
    steps = Steps(usual_batch())
    details: dict[str, Any] = {
        "pair": measure_pair(steps, rounds=ROUNDS),
        "memory": {name: harness.measure_apart(__file__, name) for name in ("ours", "plain")},
        "scaling": {
            what: {str(size): harness.measure_apart(__file__, f"{what}={size}") for size in sizes}
            for what, sizes in SWEEPS.items()
        },
    }
    harness.publish(
        "step",
        given,
        figures=figures(details),
        details=details,
        tables=tables,
        packages=["transformers"],
    )


if __name__ == "__main__":
    main()
