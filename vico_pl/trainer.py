"""One training run: a run folder, a stage, its data, and Lightning's loop around them."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from vico_pl.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
from vico_pl.callbacks.guards import GradientGuard, SyncGuard, Watchdog
from vico_pl.callbacks.records import BadRecordLog, JsonlLogger, SampleLog
from vico_pl.callbacks.signals import REQUEUE_SIGNAL, StopSignals, requeue
from vico_pl.callbacks.steps import StepProgressBar, StepSeed
from vico_pl.data.glyphs import question_words
from vico_pl.data.module import DataConfig, DataModule
from vico_pl.data.packing import SampleCost
from vico_pl.data.tokenizer import PLACEHOLDER, build_tokenizer, extend_tokenizer, load_tokenizer, token_id
from vico_pl.model.adapters import LoraConfig, adapters_merged, add_adapters
from vico_pl.model.assemble import assemble_model
from vico_pl.model.blocks import checkpoint_blocks, compile_blocks
from vico_pl.model.checkpoint.folder import load_model, save_model
from vico_pl.model.checkpoint.hub import local_folder
from vico_pl.model.checkpoint.layout import CONFIG_NAME
from vico_pl.model.flops import count_flops
from vico_pl.model.language import PACKED_ATTENTION, check_flash_attention, set_packed_attention
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Stage
from vico_pl.stages.consistency import ConsistencyConfig, ConsistencyStage
from vico_pl.stages.cost import ConsistencyCost, PretrainCost, RouterCost
from vico_pl.stages.pretrain import PretrainStage
from vico_pl.stages.router import RouterConfig, RouterStage

STAGES = ("pretrain", "consistency", "router")
PARTS = ("vision", "connectors", "language")  # of a model; the router has a stage of its own
TRAINABLE_PARTS = (*PARTS, "lora")
DTYPES: dict[str, torch.dtype | None] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "stored": None}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: a folder, or for stage `pretrain` the parts to put together."""

    # Model folder to start from, in any layout, or its name on the Hugging Face Hub: NAME or NAME@REVISION.
    path: str | None = None
    reference: str | None = None  # the same for the frozen reference; none: the model to start from
    # Of weights that are trained: float32, bfloat16, or stored (as the folder has them).
    dtype: str = "float32"
    frozen_dtype: str = "stored"  # of all others, those of the reference among them
    # Patches per vision token; connectors that the folder lacks begin fresh.
    ratios: list[int] = field(default_factory=lambda: [4, 16])
    router_heads: int | None = None  # attention heads of the router to add; none: no router is added
    # Of hidden layers of the router and of connectors above ratio 4, while they are trained.
    dropout: float = 0.1
    # What pretrain and stage 1 train: of vision, connectors and language, or lora instead of language.
    trainable: list[str] = field(default_factory=lambda: list(PARTS))
    lora: LoraConfig = field(default_factory=LoraConfig)
    # Of packed samples in training: sdpa, or flash (on CUDA, by the flash-attn package).
    attention: str = "sdpa"
    # Pretrain: an open_clip vision_cfg, or {open_clip: NAME, pretrained: TAG or file, image_size: px}.
    vision: dict[str, Any] = field(default_factory=dict)
    # Pretrain: a transformers config with its model_type, or {path: folder or name on the Hub}.
    language: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 512  # pretrain without a language path: limit of the tokenizer made for GlyphDocs

    def __post_init__(self) -> None:
        """Refuse types that do not exist."""
        for name in ("dtype", "frozen_dtype"):
            if getattr(self, name) not in DTYPES:
                given, known = getattr(self, name), ", ".join(DTYPES)
                raise ValueError(f"model.{name} is '{given}'; expected one of {known}")
        if self.attention not in PACKED_ATTENTION:
            known = ", ".join(PACKED_ATTENTION)
            raise ValueError(f"model.attention is '{self.attention}'; expected one of {known}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; expected 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length, hardware and records of a run."""

    max_steps: int = 1000  # optimizer steps
    accelerator: str = "auto"  # cpu, gpu, ...
    devices: str = "auto"  # per node
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    compile: bool = False  # torch.compile for each block: minutes at the start, faster steps
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2
    log_every: int = 10  # steps between points in TensorBoard and metrics.jsonl
    watchdog_s: float = 600.0  # a rank whose step takes longer says where it waits


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made from; `config.yaml` of its folder holds it."""

    stage: str
    run_dir: str
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


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
    tokenizer = _tokenizer(config.model)
    stage = build_stage(config, tokenizer)
    model = stage.trained_model()
    data = DataModule(
        config.data,
        tokenizer=tokenizer,
        full_tokens_per_tile=model.tokens_per_full_tile,
        seed=config.seed,
        cost=sample_cost(config, model),
    )
    _check_tile_size(config, model)
    with _lock(run_dir):
        _fit(trainer, stage, data, checkpoint=newest_checkpoint(run_dir))
        if trainer.global_step < config.trainer.max_steps:
            return trainer, None
        if trainer.is_global_zero:
            _write_model(model, tokenizer, config)
    return trainer, run_dir / "model"


def build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """Build the stage that the recipe names, with its models."""
    settings, optim, num_steps = config.model, config.optim, config.trainer.max_steps
    if config.stage == "pretrain":
        model = _prepare_policy(_starting_model(settings, tokenizer), config)
        return PretrainStage(model, optim, num_steps=num_steps)
    policy = _starting_model(settings, tokenizer)
    start, compared = _folder(settings), _folder(settings, settings.reference)
    original = _set_speed(load_model(compared, dtype=DTYPES[settings.frozen_dtype]), config)
    if config.stage == "consistency":
        policy = _prepare_policy(policy, config)
        reference = FrozenReference(original, beside=policy if start == compared else None)
        return ConsistencyStage(
            policy, reference, config.consistency, optim, num_steps=num_steps, seed=config.seed
        )
    if policy.router is not None:
        policy.router.to(DTYPES[settings.dtype])
    frozen_policy = FrozenReference(_set_speed(policy, config))
    reference = FrozenReference(original, beside=policy if start == compared else None)
    return RouterStage(frozen_policy, reference, config.router, optim, num_steps=num_steps)


def sample_cost(config: RunConfig, model: VisionLanguageModel) -> SampleCost:
    """Return what a sample costs in the stage that the recipe names."""
    flops = count_flops(model.spec)
    if config.stage == "pretrain":
        return PretrainCost(flops=flops)
    if config.stage == "router":
        return RouterCost(flops=flops)
    return ConsistencyCost(
        flops=flops,
        ratios=model.ratios,
        ratio_draw=config.consistency.ratio_draw,
        seed=config.seed,
        trains_vision="vision" in config.model.trainable,
    )


def settings_without_effect(config: RunConfig) -> Iterator[str]:
    """Yield what a recipe sets in vain, in a sentence each."""
    trains_parts, lora = config.stage != "router", config.model.lora
    if lora != LoraConfig() and not (trains_parts and "lora" in config.model.trainable):
        yield "model.lora has no effect: only a stage whose model.trainable names lora has adapters"
    if config.trainer.activation_checkpointing and not trains_parts:
        yield "trainer.activation_checkpointing has no effect: stage router trains nothing before its blocks"


def is_finished(run_dir: Path) -> bool:
    """Say whether a run has written its model."""
    return (run_dir / "model" / CONFIG_NAME).exists()


def _build_trainer(run: RunConfig, run_dir: Path, stop: StopSignals) -> L.Trainer:
    config = run.trainer
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
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


def _slurm() -> list[SLURMEnvironment]:
    """Leave stopping and queueing again to `StopSignals`, which waits for the end of a step."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _fit(trainer: L.Trainer, stage: Stage, data: DataModule, *, checkpoint: Path | None) -> None:
    # Lightning asks for a stateful loader; ours needs no state, as its position follows from the global step.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    warnings.filterwarnings(
        "ignore", message="Checkpoint directory .* exists and is not empty"
    )  # a resumed run
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


def _tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    if config.path is not None:
        return load_tokenizer(_folder(config))
    if "path" in config.language:
        return extend_tokenizer(config.language["path"], revision=config.language.get("revision"))
    return build_tokenizer(question_words(), vocab_size=config.vocab_size)


def _starting_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> VisionLanguageModel:
    """Read the model to start from, or put one together, before anything is made trainable."""
    if config.path is not None:
        dtype, heads = DTYPES[config.frozen_dtype], config.router_heads
        model = load_model(_folder(config), ratios=config.ratios, router_heads=heads, dtype=dtype)
    else:
        model = assemble_model(
            config.vision,
            config.language,
            ratios=config.ratios,
            vocab_size=len(tokenizer),
            placeholder_id=token_id(tokenizer, PLACEHOLDER),
        )
    model.set_dropout(config.dropout)
    return model


def _folder(config: ModelConfig, path: str | None = None) -> Path:
    """Return the folder of `path`, or of the model to start from."""
    if config.path is None:
        raise ValueError("model.path is not set; this stage starts from a model folder")
    return local_folder(path or config.path)


def _prepare_policy(model: VisionLanguageModel, config: RunConfig) -> VisionLanguageModel:
    """Choose what is trained of a model and how its blocks run."""
    trainable = config.model.trainable
    for name in PARTS:
        part = getattr(model, name)
        if name in trainable:
            part.to(DTYPES[config.model.dtype])
        else:
            part.requires_grad_(requires_grad=False)
    if "lora" in trainable:
        add_adapters(model.language, config.model.lora)
    _set_speed(model, config)
    if config.trainer.activation_checkpointing:
        checkpoint_blocks(model.vision)
        checkpoint_blocks(model.language)
    return model


def _set_speed(model: VisionLanguageModel, config: RunConfig) -> VisionLanguageModel:
    set_packed_attention(model.language, config.model.attention)
    if config.trainer.compile:
        compile_blocks(model.vision)
        compile_blocks(model.language)
    return model


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
