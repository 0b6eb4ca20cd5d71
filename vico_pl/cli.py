"""Train, calibrate and inspect multimodal models that route vision tokens.

Exit codes: 0 done, 1 a check found faults, 2 invalid input.
"""

import shlex
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer, echo

from vico_pl.model_cli import Model, embed, generate, open_model, route, serve
from vico_pl.shards_cli import report_faults, shards

# Each command imports what it needs: `vico --help` must not wait for torch.
app = Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(shards, name="shards")
for command in (route, generate, embed, serve):
    app.command()(command)

INTERRUPTED = 130  # the exit code that Typer gives Ctrl-C

Recipe = Annotated[Path, Argument(help="YAML recipe, such as recipes/demo/router.yaml.")]
Overrides = Annotated[list[str] | None, Argument(help="Settings that override the recipe: key=value ...")]
Data = Annotated[str, Option(help="Shards of held-out data, or with --suite-dir a suite such as docvqa.")]
SuiteDir = Annotated[Path | None, Option(help="Folder with the files of the suite, parquet or TSV.")]
Metric = Annotated[str | None, Option(help="Score answers that name no metric with this one, such as anls.")]


def _print_version(is_asked: bool) -> bool:
    if is_asked:
        echo(f"vico_pl {version('vico_pl')}")
        raise SystemExit(0)
    return is_asked


@app.callback()
def _options(
    _: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that need no command."""


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a stage; the same command resumes an interrupted run.

    Example: vico train recipes/demo/router.yaml run_dir=runs/mine optim.lr=5e-4
    """
    from lightning.pytorch.utilities import rank_zero_only

    from vico_pl.prepare import is_finished, prepare_run
    from vico_pl.stages import STAGES
    from vico_pl.trainer import train as run

    config = prepare_run(recipe, overrides or [])
    model, reference = f"{config.run_dir}/model", config.model.reference or config.model.path
    next_step = STAGES[config.stage].what_next(config).format(model=model, reference=reference)
    if is_finished(Path(config.run_dir)):
        echo(f"{config.run_dir} is finished: its model is {model}\nNext: {next_step}")
        return
    try:
        is_done = run(config) is not None
    except (ValueError, OSError):
        _discard_unused(Path(config.run_dir))
        raise
    if is_done and getattr(rank_zero_only, "rank", 0) == 0:
        echo(f"{model} is written\nNext: {next_step}")


@app.command()
def audit(run: Annotated[Path, Argument(help="Run folder, finished or not.")]) -> None:
    """Check that a run used each sample once per epoch, in order (exit code 1 if not).

    Example: vico audit runs/demo/router
    """
    from vico_pl.audit import audit_run, format_table, format_verdict
    from vico_pl.config import load_config

    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: no config.yaml; expected the folder of a run")
    config = load_config(run / "config.yaml", [])
    done = _completed_steps(run, max_steps=config.trainer.max_steps)
    found = audit_run(run, config.data, seed=config.seed, completed_steps=done)
    echo(f"{format_table(found)}\n{format_verdict(found)}")
    report_faults(found.faults)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    shape: Annotated[
        str | None,
        Option(help="Plan for this size of InternVL3.5 instead of the recipe's model, for example 8b."),
    ] = None,
    mfu: Annotated[
        float, Option(min=0.01, max=1, help="Model FLOPs utilisation: achieved fraction of peak FLOPs.")
    ] = 0.4,
    json_: Annotated[Path | None, Option("--json", help="Also write the plan to this JSON file.")] = None,
) -> None:
    """Predict what a recipe needs: memory per GPU, FLOPs, hours, and which GPUs fit.

    Example: vico plan recipes/internvl3_5-8b/consistency.yaml trainer.num_nodes=2
    """
    from vico_pl.config import load_config
    from vico_pl.files import write_json
    from vico_pl.planning.plan import build_plan, format_plan

    made = build_plan(load_config(recipe, overrides or []), shape=shape, mfu=mfu)
    echo(format_plan(made))
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        write_json(made.figures, json_)
        echo(f"\n{json_} is written")


@app.command()
def doctor(
    recipe: Annotated[Path | None, Argument(help="Recipe to check as well.")] = None,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None, Option(help="Held-out shards: say how they will be scored; repeatable.")
    ] = None,
) -> None:
    """Check this machine, and a recipe, for problems that would stop a run (exit code 1 if any).

    Example: vico doctor recipes/demo/consistency.yaml
    """
    from vico_pl.doctor import examine

    raise SystemExit(examine(recipe, overrides or [], held_out=data or [], write=echo))


@app.command()
def calibrate(
    model: Model,
    data: Data,
    retention: Annotated[
        float,
        Option(min=0, max=1, help="Fraction of the full-token accuracy to keep, with 97.5 % certainty."),
    ] = 0.99,
    budget: Annotated[
        float | None, Option(min=0, max=1, help="Largest fraction of vision tokens, instead of --retention.")
    ] = None,
    dtype: Annotated[
        str,
        Option(help="Dtype of the weights, as the export will have: auto, stored, bfloat16 or float32."),
    ] = "auto",
    suite_dir: SuiteDir = None,
    metric: Metric = None,
) -> None:
    """Choose the router's threshold and write it with its accuracy curve to MODEL/calibration.json.

    Example: vico calibrate runs/demo/router/model --data data/shards/glyphs/calibration
    """
    from vico_pl.evaluation.calibrate import calibrate as choose
    from vico_pl.evaluation.questions import open_questions
    from vico_pl.files import write_json
    from vico_pl.inference.predictor import Predictor
    from vico_pl.model.families.base import CALIBRATION_NAME
    from vico_pl.model.router import NEVER

    # No name on the Hub: the threshold is written into the folder.
    session = Predictor.load(Path(model), dtype=_dtype(dtype, auto="auto"))
    questions = open_questions(session, data, suite_dir=suite_dir, metric=metric)
    chosen, record = choose(questions, retention=retention, budget=budget)
    written = Path(model) / CALIBRATION_NAME
    write_json(record, written)
    sure = f"at least {chosen.retention_bound or 0:.2%} with 97.5 % certainty"
    kept = f"{chosen.retention['mean']:.2%} of the accuracy, {sure}"
    if chosen.threshold == NEVER and budget is None:
        kept = f"no threshold is sure to keep {retention:.2%} of the accuracy, so nothing is compressed"
    echo(f"threshold {chosen.threshold:.4f}: {chosen.token_fraction:.1%} of the vision tokens, {kept}")
    if record["promising"] is not None:
        fewer, number = record["promising"]["token_fraction"], record["promising"]["images_needed"]
        echo(f"{fewer:.1%} may keep it, too: about {number} images, not {chosen.num_images}, would show it")
    echo(f"accuracy: {questions.measure}; {written} is written")
    echo(f"Next: vico eval {model} --data SHARDS, with held-out shards that no threshold was chosen on")


@app.command("eval")
def eval_(
    model: Model,
    data: Data,
    output: Annotated[Path | None, Option(help="Folder of the report. Default: MODEL/report.")] = None,
    suite_dir: SuiteDir = None,
    metric: Metric = None,
    arm: Annotated[
        list[str] | None,
        Option(
            help="Arm next to full tokens; repeatable. Default: all but greedy_oracle, fastv and pooling."
        ),
    ] = None,
    reference: Annotated[
        str | None, Option(help="Further model, asked at full tokens: retention is relative to it.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random arm and the bootstrap.")] = 0,
) -> None:
    """Compare the router with baselines of the same token budget; write report.json and report.html.

    Example: vico eval runs/demo/router/model --data data/shards/glyphs/val
    """
    from vico_pl.callbacks.dashboard import log_report
    from vico_pl.evaluation.evaluate import evaluate
    from vico_pl.evaluation.questions import open_questions
    from vico_pl.evaluation.report import build_gallery, format_table, write_html
    from vico_pl.files import write_json

    session, other = open_model(model), None if reference is None else open_model(reference)
    folder = output or session.folder / "report"
    questions = open_questions(session, data, suite_dir=suite_dir, metric=metric)
    command = shlex.join(["vico", *sys.argv[1:]])
    report, examples = evaluate(questions, seed=seed, arms=arm, reference=other, command=command)
    write_html(report, path=folder / "report.html", gallery=build_gallery(questions, examples))
    write_json(report, folder / "report.json")
    log_report(session.folder.parent, report)
    echo(format_table(report))
    echo(f"{folder}/report.html and {folder}/report.json are written")
    echo(f"Next: vico generate {model} IMAGE --prompt TEXT, or vico export {model} FOLDER for a server")


@app.command()
def export(
    model: Annotated[
        str,
        Argument(help="Model folder in any layout, name on the Hugging Face Hub, or checkpoint of a run."),
    ],
    output: Annotated[Path, Argument(help="Folder to write.")],
    layout: Annotated[
        str | None,
        Option(help="flash (default; released code, LMDeploy), internvl, hf or ours (checkpoints)."),
    ] = None,
    template: Annotated[
        str | None, Option(help="Released model (folder or Hub name) whose code and tokenizer are copied.")
    ] = None,
    dtype: Annotated[
        str, Option(help="Dtype of the weights: stored (unchanged), bfloat16 or float32.")
    ] = "stored",
) -> None:
    """Convert a model to another layout; weights change only with --dtype.

    Example: vico export runs/router/model flash --template OpenGVLab/InternVL3_5-1B-Flash
    """
    from vico_pl.model.families.base import CONFIG_NAME
    from vico_pl.model.families.folder import TEMPLATE_FILES
    from vico_pl.model.families.folder import export as write
    from vico_pl.model.families.hub import local_folder

    if model.rstrip("/").endswith(".ckpt"):  # a file, or a folder
        from vico_pl.trainer import export_checkpoint

        if layout not in (None, "ours") or template is not None or dtype != "stored":
            raise ValueError(f"{model}: a checkpoint becomes a folder in our layout; export that one then")
        export_checkpoint(Path(model), output)
        echo(f"{output} is written in the layout 'ours'")
        return
    weights = _dtype(dtype)  # first, as a download takes long
    code = None if template is None else local_folder(template, (CONFIG_NAME, *TEMPLATE_FILES))
    write(local_folder(model), output, layout=layout or "flash", template=code, dtype=weights)
    echo(f"{output} is written in the layout '{layout or 'flash'}'")


def main() -> None:
    """Run the command; invalid input ends with one sentence and exit code 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except (ValueError, OSError) as error:
        echo(f"vico: {error}", err=True)
        raise SystemExit(2) from error
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            echo("vico: interrupted; the same command resumes", err=True)
        raise


def _dtype(name: str, **others: Any) -> Any:
    """Return the dtype that an option names, or one of the other values it takes."""
    from vico_pl.stages.settings import DTYPES

    known = {**others, **DTYPES}
    if name not in known:
        raise ValueError(f"--dtype is '{name}'; expected one of {', '.join(known)}")
    return known[name]


def _completed_steps(run: Path, *, max_steps: int) -> int:
    """Return the steps that a run has saved: all if it is finished, else those of its newest checkpoint."""
    from vico_pl.callbacks.checkpoints import newest_checkpoint
    from vico_pl.prepare import is_finished

    checkpoint = newest_checkpoint(run)
    if is_finished(run):
        return max_steps
    return 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])


def _discard_unused(run_dir: Path) -> None:
    """Remove the folder of a run that never started, so that the corrected command can use its name."""
    if [path.name for path in run_dir.iterdir()] == ["config.yaml"]:
        shutil.rmtree(run_dir)
