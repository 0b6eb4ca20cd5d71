"""One training run: a run folder, a stage, its data, and Lightning's loop around them."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from vico_pl.build import build_run_tokenizer, build_stage, load_trained, sample_cost
from vico_pl.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
from vico_pl.callbacks.guards import GradientGuard, SyncGuard, Watchdog
from vico_pl.callbacks.records import BadRecordLog, JsonlLogger, SampleLog
from vico_pl.callbacks.signals import REQUEUE_SIGNAL, StopSignals, requeue
from vico_pl.callbacks.steps import StepProgressBar, StepSeed
from vico_pl.data.module import DataModule
from vico_pl.losses.liger import check_liger
from vico_pl.model.adapters import adapters_merged
from vico_pl.model.families.base import CONFIG_NAME
from vico_pl.model.families.folder import save_model
from vico_pl.model.language import check_flash_attention
from vico_pl.model.sharding import whole_state
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.recipe import RunConfig, TrainerConfig, settings_without_effect
from vico_pl.stages.base import Stage


def train(config: RunConfig) -> Path | None:
    """Run a stage to its end, from its newest checkpoint if it has one.

    Returns the model folder that was written; None: the run was told to stop, and is saved.
    """
    with StopSignals() as stop:
        trainer, folder = _train(config, stop)
    if folder is None and trainer.is_global_zero and stop.received == REQUEUE_SIGNAL:
        requeue()
    return folder


def _train(config: RunConfig, stop: StopSignals) -> tuple[L.Trainer, Path | None]:
    run_dir = Path(config.run_dir)
    L.seed_everything(config.seed, verbose=False)
    for setting in settings_without_effect(config):
        rank_zero_warn(setting)
    trainer = _build_trainer(config, run_dir, stop)
    if config.model.attention == "flash":
        check_flash_attention(trainer.strategy.root_device)
    if config.stage == "consistency" and config.consistency.kernel == "liger":
        check_liger(trainer.strategy.root_device)
    tokenizer = build_run_tokenizer(config.model)
    stage = build_stage(config, tokenizer)
    model = stage.trained_model()
    data = DataModule(
        config.data,
        tokenizer=tokenizer,
        full_tokens_per_tile=model.tokens_per_full_tile,
        seed=config.seed,
        cost=sample_cost(config, model),
        with_digests=config.stage == "consistency" and config.consistency.reference_cache is not None,
    )
    _check_tile_size(config, model)
    with _lock(run_dir):
        _fit(trainer, stage, data, checkpoint=newest_checkpoint(run_dir))
        if trainer.global_step < config.trainer.max_steps:
            return trainer, None
        state = whole_state(model) if stage.is_sharded else None
        if trainer.is_global_zero:
            whole = model if state is None else load_trained(state, config, tokenizer)
            _write_model(whole, tokenizer, config)
    return trainer, run_dir / "model"


def is_finished(run_dir: Path) -> bool:
    """Say whether a run has written its model."""
    return (run_dir / "model" / CONFIG_NAME).exists()


def _build_trainer(run: RunConfig, run_dir: Path, stop: StopSignals) -> L.Trainer:
    config = run.trainer
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=config.precision,  # type: ignore[arg-type]  # Lightning itself checks the name
        max_steps=config.max_steps,
        limit_train_batches=config.max_steps,
        log_every_n_steps=config.log_every,
        callbacks=[
            stop,
            StepSeed(run.seed),
            StepProgressBar(run.stage),
            SampleLog(run_dir),  # before those that may stop the run
            BadRecordLog(run_dir / "bad_records.jsonl", max_bad_fraction=run.data.max_bad_fraction),
            GradientGuard(run_dir / "skipped_steps.jsonl"),
            SyncGuard(every=config.checkpoint_every),
            Watchdog(run_dir, limit_s=config.watchdog_s),
            StepCheckpoint(
                run_dir / "checkpoints", every=config.checkpoint_every, keep=config.keep_checkpoints
            ),
        ],
        logger=[
            TensorBoardLogger(run_dir, name="tensorboard", version=""),
            JsonlLogger(run_dir / "metrics.jsonl"),
        ],
        plugins=[AtomicCheckpointIO(), *_slurm()],
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


def _strategy(config: TrainerConfig) -> str | Strategy:
    timeout = timedelta(seconds=config.timeout_s)
    if config.strategy == "ddp":
        return DDPStrategy(timeout=timeout)
    if config.strategy != "fsdp":
        return config.strategy
    per_node = int(config.devices) if config.devices != "auto" else max(torch.cuda.device_count(), 1)
    # One file, put together on the first rank, which any number of ranks can load.
    return ModelParallelStrategy(
        data_parallel_size=per_node * config.num_nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        timeout=timeout,
    )


def _slurm() -> list[SLURMEnvironment]:
    """Leave stopping and queueing again to `StopSignals`, which waits for the end of a step."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _fit(trainer: L.Trainer, stage: Stage, data: DataModule, *, checkpoint: Path | None) -> None:
    # Lightning asks for a stateful loader; ours needs no state, as its position follows from the global step.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    warnings.filterwarnings(
        "ignore", message="Checkpoint directory .* exists and is not empty"
    )  # a resumed run
    # Nothing changes what a sharded model returns in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What Lightning recommends there is a checkpoint of the weights before the step that it counts.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # within Lightning itself
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # A broadcast and a wait of the GPU at each step; `StopSignals` tells the ranks.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # noqa: SLF001
    try:
        trainer.fit(stage, data, ckpt_path=checkpoint)
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        rank_zero_info("Interrupted. The same command goes on from the newest checkpoint.")
        raise KeyboardInterrupt from error


def _check_tile_size(config: RunConfig, model: VisionLanguageModel) -> None:
    tile_size = config.data.tiling.tile_size
    if tile_size != model.vision.tile_size:
        seen = model.vision.tile_size
        raise ValueError(f"data.tiling.tile_size is {tile_size} but the model sees tiles of {seen} pixels")


def _write_model(model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    folder = Path(config.run_dir) / "model"
    tokenizer.save_pretrained(folder)
    processing = {"tiling": asdict(config.data.tiling), "chat": asdict(config.data.chat)}
    with adapters_merged(model):
        save_model(model, folder, processing=processing)  # last, as its configuration marks a finished run


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of a run; the lock ends with the process, however it ends."""
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{run_dir} is being trained by another process; wait for it or stop it"
            ) from error
        yield
