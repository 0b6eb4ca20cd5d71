"""The `vico` command. Exit 0: done; 1: a check found faults; 2: the user's input is wrong."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
shards = typer.Typer(no_args_is_help=True, help="Make and inspect folders of WebDataset shards.")
app.add_typer(shards, name="shards")


@shards.command()
def glyphs(
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    num_samples: Annotated[int, typer.Option(help="Images to draw.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other images.")] = 0,
    max_tiles: Annotated[int, typer.Option(help="Tiles of the largest image, 1 to 6.")] = 6,
    questions: Annotated[int, typer.Option(help="Questions per image.")] = 8,
    read_fraction: Annotated[float, typer.Option(help="Share of pages of text to be read aloud.")] = 0.0,
    samples_per_shard: Annotated[int, typer.Option(help="Images per tar.")] = 500,
) -> None:
    """Draw GlyphDocs, the embedded default's data."""
    from vico_pl.data.build import build_glyphs
    from vico_pl.data.glyphs import GlyphsConfig

    config = GlyphsConfig(max_tiles=max_tiles, questions_per_image=questions, read_fraction=read_fraction)
    build_glyphs(output, config, num_samples=num_samples, seed=seed, samples_per_shard=samples_per_shard)


@app.command("train")
def train_(
    recipe: Annotated[Path, typer.Argument(help="A YAML file of recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the recipe.")] = None,
) -> None:
    """Run a stage of training; an interrupted run goes on where it was."""
    from vico_pl.config import open_run
    from vico_pl.trainer import is_finished, train

    config = open_run(recipe, overrides or [])
    if is_finished(Path(config.run_dir)):
        typer.echo(f"{config.run_dir} is finished: its model is {config.run_dir}/model")
        return
    typer.echo(f"{train(config)} is written")


def main() -> None:
    """Run the command; what the user got wrong is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"vico: {error}", err=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("vico: interrupted; the same command goes on from here", err=True)
        raise SystemExit(130) from error
