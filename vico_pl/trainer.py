"""One training run: a run folder, a stage, its data, and Lightning's loop around them."""

import fcntl
import logging
import multiprocessing
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from vico_pl.callbacks import guards
from vico_pl.callbacks.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    StepCheckpoint,
    checkpoint_fault,
    newest_checkpoint,
)
from vico_pl.callbacks.dashboard import Dashboard
from vico_pl.callbacks.loggers import build_logger
from vico_pl.callbacks.records import BadRecordLog, EnvironmentLog, SampleLog, StepProgressBar
from vico_pl.callbacks.sharded import ShardedStrategy, read_checkpoint
from vico_pl.callbacks.speed import Speed
from vico_pl.config import RunConfig, load_config
from vico_pl.data.module import DataModule
from vico_pl.evaluation.validation_answers import ValidationAnswers
from vico_pl.model.adapters import adapters_merged
from vico_pl.model.blocks import whole_state
from vico_pl.model.families.folder import save_model
from vico_pl.model.flops import count_flops
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.prepare import FolderModels
from vico_pl.stages import STAGES, build_stage
from vico_pl.stages.base import Stage
from vico_pl.stages.settings import TrainerConfig
from vico_pl.stages.validation import Validation
from vico_pl.tokens import save_tokenizer

MAX_FILES = 65_536  # open at a time, if the system allows as many
# What Lightning says at each start that helps nobody; 'vico doctor' lists devices.
CHATTER = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "IPU available:",
    "💡 Tip:",
    "`Trainer.fit` stopped",
)
# Warnings that do not concern a run: a pattern for each.
HARMLESS_WARNINGS = (
    "The `srun` command is available on your system but is not used",
    "GPU available but not used",  # the recipe says so
    # Our loader needs no state: its position is a function of the global step.
    "You're resuming from a checkpoint that ended before the epoch",
    "Checkpoint directory .* exists and is not empty",  # resuming
    "FSDP2-wrapped module .* returned a view tensor",  # nothing changes it in place
    ".*LeafSpec.* is deprecated",  # within Lightning itself
    # It recommends a checkpoint of the weights before the step that is counted.
    "Using ModelCheckpoint with manual optimization",
    "It is recommended to use `self.log",  # `Validation` logs the same value on all ranks
)


def train(config: RunConfig) -> Path | None:
    """Train to the last step, from the newest checkpoint if there is one.

    Returns the model folder, or None if the run was asked to stop and has saved its state.
    """
    _allow_files()
    with guards.StopSignals() as stop:
        trainer, folder = _train(config, stop)
    if folder is None and trainer.is_global_zero and stop.received == guards.REQUEUE_SIGNAL:
        guards.requeue()
    return folder


def _allow_files() -> None:
    """Let this process and its data workers open more files, as systems often begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _train(config: RunConfig, stop: guards.StopSignals) -> tuple[L.Trainer, Path | None]:
    run_dir, stage_class = Path(config.run_dir), STAGES[config.stage]
    L.seed_everything(config.seed, verbose=False)
    for problem in stage_class.doubtful_settings(config):
        rank_zero_warn(problem)
    trainer = build_trainer(config, stop)
    stage_class.check_device(config, trainer.strategy.root_device)
    models = FolderModels(config)
    tokenizer = models.tokenizer
    stage = build_stage(config, models)
    model = stage.trained_model()
    data = DataModule(
        config.data,
        tokenizer=tokenizer,
        full_tokens_per_tile=model.tokens_per_full_tile,
        seed=config.seed,
        cost=stage_class.cost(config, count_flops(model.spec)),
        max_positions=model.max_positions,
    )
    with _lock(run_dir):
        _fit(trainer, stage, data, checkpoint=newest_checkpoint(run_dir))
        if trainer.global_step < config.trainer.max_steps:
            return trainer, None
        _check_has_trained(trainer, run_dir)
        state = whole_state(model) if stage.is_sharded else None
        if trainer.is_global_zero:
            whole = model if state is None else models.trained(state)
            _write_model(whole, tokenizer, config, run_dir / "model", rule=stage.rule)
    return trainer, run_dir / "model"


def _keep_quiet() -> None:
    """Hide messages of other packages that do not concern a run."""
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_chatter)


def _is_no_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def build_trainer(config: RunConfig, stop: guards.StopSignals) -> L.Trainer:
    """Build Lightning's trainer for a run.

    Raises:
        ValueError: the machine cannot do what the recipe asks for.
    """
    _keep_quiet()
    try:
        return _build_trainer(config, Path(config.run_dir), stop)
    except (MisconfigurationException, ModuleNotFoundError) as error:  # what Lightning raises for hardware
        raise ValueError(f"trainer: {error} 'vico doctor' lists what this machine has") from error


def _build_trainer(run: RunConfig, run_dir: Path, stop: guards.StopSignals) -> L.Trainer:
    config, every = run.trainer, run.trainer.checkpoint_every
    # Leave stopping and requeueing to `StopSignals`, which waits for the end of a step.
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=config.precision,  # type: ignore[arg-type]  # Lightning itself checks the name
        max_steps=config.max_steps,
        limit_train_batches=config.max_steps,
        limit_val_batches=None if config.validate_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(config.log_every, config.max_steps),  # a short run logs its last step
        callbacks=[
            stop,
            guards.StepSeed(run.seed),
            StepProgressBar(run.stage),
            EnvironmentLog(run_dir / "environment.jsonl"),
            SampleLog(run_dir),  # before callbacks that may stop the run
            BadRecordLog(run_dir / "bad_records.jsonl", max_bad_fraction=run.data.max_bad_fraction),
            guards.GradientGuard(run_dir / "skipped_steps.jsonl"),
            guards.DataGuard(),
            guards.SyncGuard(every=every),
            guards.Watchdog(run_dir, limit_s=config.watchdog_s),
            StepCheckpoint(run_dir / "checkpoints", every=every, keep=config.keep_checkpoints),
            *_validation(run, run_dir),
        ],
        logger=[build_logger(name, run_dir) for name in config.loggers],
        plugins=[AtomicCheckpointIO(), *slurm],
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


def _validation(run: RunConfig, run_dir: Path) -> Iterator[L.Callback]:
    config = run.trainer
    names = [entry.name for entry in run.data.validation] if config.validate_every else []
    if names:
        yield Validation(names, every=config.validate_every)
        yield ValidationAnswers(run.data.validation)
    yield Dashboard(names)
    yield Speed(precision=config.precision)  # last: what follows it would count as waiting for data
    if config.best_metric is not None:
        yield BestCheckpoint(run_dir / "checkpoints", metric=config.best_metric, mode=config.best_mode)


def _strategy(config: TrainerConfig) -> str | Strategy:
    timeout = timedelta(seconds=config.timeout_s)
    if config.strategy == "ddp":
        return DDPStrategy(timeout=timeout)
    if config.strategy != "fsdp":
        return config.strategy
    per_node = int(config.devices) if config.devices != "auto" else max(torch.cuda.device_count(), 1)
    ranks = per_node * config.num_nodes
    return ShardedStrategy(data_parallel_size=ranks, tensor_parallel_size=1, timeout=timeout)


def _fit(trainer: L.Trainer, stage: Stage, data: DataModule, *, checkpoint: Path | None) -> None:
    # A broadcast and a wait for the GPU at each step; `StopSignals` informs the ranks.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # noqa: SLF001
    try:
        trainer.fit(stage, data, ckpt_path=checkpoint)
    except SystemExit as error:  # how Lightning ends after a second Ctrl-C
        rank_zero_info("Interrupted. The same command resumes from the newest checkpoint.")
        raise KeyboardInterrupt from error
    finally:
        for worker in multiprocessing.active_children():  # one that waits for a slow source ignores SIGTERM
            worker.kill()


def _check_has_trained(trainer: L.Trainer, run_dir: Path) -> None:
    if not any(isinstance(c, guards.GradientGuard) and c.has_trained for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"{run_dir}: none of the {trainer.global_step} steps had anything to train on, so no model is "
            "written; bad records are in bad_records.jsonl there, and stage router needs "
            "router.min_history tiles first; correct the recipe or its data, and set another run_dir"
        )


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write the model of a checkpoint, which lies in the folder of its run, as the run writes its last one.

    Raises:
        ValueError: the run or the checkpoint cannot be read, or `folder` is not empty.
    """
    recipe = path.absolute().parents[1] / "config.yaml"
    if not recipe.is_file():
        raise ValueError(f"{path}: no {recipe}; expected a checkpoint in RUN/checkpoints")
    fault = checkpoint_fault(path)
    if fault is not None:
        raise ValueError(f"{path}: it cannot be read ({fault})")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; name a new folder")
    config = load_config(recipe, [])
    models = FolderModels(config)
    stage = build_stage(config, models)
    checkpoint = read_checkpoint(path, optimizer=False)
    stage.on_load_checkpoint(checkpoint)
    stage.load_state_dict(checkpoint["state_dict"], strict=stage.strict_loading, assign=True)
    model = stage.trained_model()
    model.language.tie_weights()  # loading replaced one of the two
    _write_model(model, models.tokenizer, config, folder, rule=stage.rule)


def _write_model(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    folder: Path,
    *,
    rule: RoutingRule | None,
) -> None:
    save_tokenizer(tokenizer, folder)
    processing = {"tiling": asdict(config.data.tiling), "chat": asdict(config.data.chat)}
    with adapters_merged(model):
        save_model(
            model, folder, processing=processing, rule=rule
        )  # last: its configuration marks a finished run


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of a run; the lock ends with the process, however that ends."""
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            occupied = f"{run_dir} is being trained by another process"
            raise ValueError(f"{occupied}; wait for it or stop it") from error
        except OSError as error:  # Lustre without -o flock, some NFS
            rank_zero_warn(
                f"{run_dir}: its file system has no locks ({error}); start no second process there"
            )
        yield
