"""The `vico shards` commands: build, index, check and inspect sets of shards."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer, echo

shards = Typer(no_args_is_help=True, help="Build and inspect sets of WebDataset shards.")

Source = Annotated[
    str, Argument(help="Folder, glob, brace range or tar, local or at a URL (see data/README.md).")
]
Output = Annotated[Path, Option(help="File or folder to write.")]
Workers = Annotated[int | None, Option(min=1, help="Number of processes. Default: one per CPU core.")]


@shards.command()
def glyphs(
    output: Output,
    num_samples: Annotated[int, Option(min=1, help="Number of images.")] = 1000,
    seed: Annotated[int, Option(help="Seed of the images.")] = 0,
    max_tiles: Annotated[int, Option(help="Most tiles per image, 1 to 6.")] = 6,
    questions: Annotated[int, Option(help="Questions per image.")] = 4,
    comparisons: Annotated[int, Option(help="Most comparison questions per image.")] = 1,
    read_fraction: Annotated[
        float, Option(help="Fraction of images that are text pages to transcribe.")
    ] = 0.0,
    read_pairs: Annotated[int, Option(min=1, help="Most pairs of letter and digit on such a page.")] = 16,
    shapes_fraction: Annotated[
        float, Option(help="Free layout: fraction of images that show shapes alone.")
    ] = 0.0,
    layout: Annotated[
        str, Option(help="aligned: a tile for each thing; free: content anywhere.")
    ] = "aligned",
    jitter: Annotated[int, Option(help="Aligned layout: move text by up to so many px, 0 to 15.")] = 0,
    lookalikes: Annotated[
        float, Option(help="Free layout: most blocks of symbols per tile that look like text, 0 to 10.")
    ] = 0.0,
    shift: Annotated[str, Option(help="Free layout, for tests: fonts, sizes or damage.")] = "none",
    samples_per_shard: Annotated[int, Option(min=1, help="Images per tar.")] = 500,
) -> None:
    """Generate GlyphDocs, the data set of the demo.

    Example: vico shards glyphs --output data/shards/mine --num-samples 200 --seed 7
    """
    from vico_pl.data.glyphs import GlyphsConfig
    from vico_pl.data.shards.build import build_glyphs

    config = GlyphsConfig(
        layout=layout,
        jitter=jitter,
        lookalikes=lookalikes,
        shift=shift,
        max_tiles=max_tiles,
        questions_per_image=questions,
        comparisons_per_image=comparisons,
        read_fraction=read_fraction,
        read_pairs=read_pairs,
        shapes_fraction=shapes_fraction,
    )
    size = {"num_samples": num_samples, "samples_per_shard": samples_per_shard}
    _print_totals(output, build_glyphs(output, config, seed=seed, **size))


@shards.command()
def build(
    annotations: Annotated[
        list[Path],
        Option(help="JSONL or JSON list of LLaVA, or parquet files or folders; repeatable."),
    ],
    output: Output,
    images: Annotated[Path, Option(help="Folder to which image paths of JSON are relative.")] = Path(),
    samples_per_shard: Annotated[
        int | None, Option(min=1, help="Most records per tar. Default: 1000, without --shard-size.")
    ] = None,
    shard_size: Annotated[float | None, Option(min=0, help="Most megabytes (10^6 bytes) per tar.")] = None,
    workers: Workers = None,
) -> None:
    """Write annotations and their images as shards; bad records are reported and left out (exit code 1).

    Example: vico shards build --annotations notes.jsonl --images photos --output data/shards/mine
    """
    from vico_pl.data.shards.build import build_from_annotations

    max_bytes = None if shard_size is None else max(int(shard_size * 1e6), 1)
    index, faults = build_from_annotations(
        annotations, images, output, max_samples=samples_per_shard, max_bytes=max_bytes, workers=workers
    )
    _print_totals(output, index)
    report_faults(faults)


@shards.command("index")
def index_(source: Source, workers: Workers = None) -> None:
    """Index a folder of tars, also of other tools; for any other source, count the samples.

    Example: vico shards index data/shards/mine
    """
    from vico_pl.data.shards.reader import read_index, write_index

    is_folder = Path(source).is_dir()
    _print_totals(source, write_index(source, workers=workers) if is_folder else read_index(source))


@shards.command()
def check(
    source: Source,
    caption_prompt: Annotated[str | None, Option(help="As caption_prompt of data.sources.")] = None,
) -> None:
    """Decode every record and report the bad ones (exit code 1 if any).

    Example: vico shards check data/shards/mine
    """
    from vico_pl.data.shards.reader import find_faults, read_index

    index = read_index(source)
    if index.num_samples == 0:
        raise ValueError(f"{_shown(source)}: no records; expected members KEY.json, KEY.jpg (data/README.md)")
    report_faults(find_faults(index, caption_prompt=caption_prompt))
    echo(f"{_shown(source)}: all {index.num_samples} records are usable")


@shards.command()
def stats(
    source: Source,
    output: Annotated[Path | None, Option(help="Also draw histograms to this PNG.")] = None,
    tokenizer: Annotated[
        str | None, Option(help="Model folder whose tokenizer counts text in tokens instead of bytes.")
    ] = None,
) -> None:
    """Count samples, images, tiles, text, answers and bad records; optionally draw histograms.

    Example: vico shards stats data/shards/mine --output stats.png
    """
    from vico_pl.data.shards.preview import draw, survey

    tokenize = None
    if tokenizer is not None:
        from vico_pl.tokens import load_tokenizer

        tokenize = load_tokenizer(tokenizer).tokenize
    found = survey(source, tokenize=tokenize)
    for name, value in found.counts().items():
        echo(f"{name:24} {value}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(found).savefig(output, dpi=120)
        echo(f"{output} is written")


@shards.command()
def preview(
    source: Source,
    output: Output = Path("preview.png"),
    count: Annotated[int, Option(min=1, help="Number of samples.")] = 12,
) -> None:
    """Draw the first samples with their questions and answers.

    Example: vico shards preview data/shards/mine --output sheet.png
    """
    from vico_pl.data.shards.preview import contact_sheet
    from vico_pl.data.shards.reader import read_samples

    samples = list(islice(read_samples(source), count))
    if not samples:
        shown = _shown(source)
        raise ValueError(f"{shown}: no usable sample to show; see 'vico shards check {shown}'")
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(samples).save(output)
    echo(f"{output} is written")


def report_faults(faults: Iterable[Any]) -> None:
    """Print faults as they are found; exit with code 1 if there was one."""
    found = False
    for fault in faults:
        echo(f"{fault.id}: {fault.reason}", err=True)
        found = True
    if found:
        raise SystemExit(1)


def _print_totals(source: Path | str, index: Any) -> None:
    sizes = [entry.num_bytes for entry in index.entries]
    size = "" if None in sizes else f", {sum(sizes):,} bytes"
    echo(f"{_shown(source)}: {index.num_samples} samples in {len(index.names)} shards{size}")


def _shown(source: Path | str) -> str:
    from vico_pl.data.shards.locations import without_secrets

    return without_secrets(str(source))
