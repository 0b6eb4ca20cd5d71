"""The sections of a recipe that every stage reads."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from vico_pl.data.module import DataConfig
from vico_pl.errors import check_settings
from vico_pl.model.adapters import LoraConfig
from vico_pl.model.connector import STARTS
from vico_pl.model.language import PACKED_ATTENTION
from vico_pl.optim import OptimConfig

Section = TypeVar("Section")
PARTS = ("vision", "connectors", "language")  # of a model; the router has a stage of its own
TRAINABLE_PARTS = (*PARTS, "lora")
LOGGERS = ("tensorboard", "jsonl", "csv", "wandb", "mlflow")  # the last two are packages of their own
DTYPES: dict[str, torch.dtype | None] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "stored": None}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: a folder or, in stage `pretrain`, the parts to assemble."""

    # Model folder to start from, in any layout, or its name on the Hugging Face Hub: NAME or NAME@REVISION.
    path: str | None = None
    reference: str | None = None  # the same for the frozen reference; default: the model to start from
    dtype: str = "float32"  # of trained weights: float32, bfloat16, or stored (as in the folder)
    frozen_dtype: str = "stored"  # of all other weights, including the reference
    ratios: list[int] = field(default_factory=lambda: [4, 16])  # patches per vision token
    # Of connectors that the folder lacks: about the mean of the full tokens in each token's place, or random.
    connector_start: str = "mean"
    router_heads: int | None = None  # attention heads of the router to add; default: no router is added
    # In training, for hidden layers of the router and of connectors above ratio 4.
    dropout: float = 0.1
    # What pretrain and stage 1 train: some of vision, connectors and language, or lora instead of language.
    trainable: list[str] = field(default_factory=lambda: list(PARTS))
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: str = "sdpa"  # over packed samples: sdpa, or flash (CUDA, needs the flash-attn package)
    # Pretrain: an open_clip vision_cfg, or {open_clip: NAME, pretrained: TAG or file, image_size: px}, and
    # optionally image_mean and image_std.
    vision: dict[str, Any] = field(default_factory=dict)
    # Pretrain: a transformers config with its model_type, or {path: folder or name on the Hub}.
    language: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 512  # pretrain without a language path: limit of the tokenizer built for GlyphDocs

    def __post_init__(self) -> None:
        known = f"one of {', '.join(DTYPES)}"
        check_settings(
            "model",
            self,
            dtype=(self.dtype in DTYPES, known),
            frozen_dtype=(self.frozen_dtype in DTYPES, known),
            attention=(self.attention in PACKED_ATTENTION, f"one of {', '.join(PACKED_ATTENTION)}"),
            connector_start=(self.connector_start in STARTS, f"one of {', '.join(STARTS)}"),
            dropout=(0 <= self.dropout < 1, "0 to below 1"),
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length, hardware and logging of a run."""

    max_steps: int = 1000  # optimizer steps
    accelerator: str = "auto"  # cpu, gpu, ...
    devices: str = "auto"  # per node: a number, or auto for all
    num_nodes: int = 1  # machines
    strategy: str = "auto"  # auto, ddp, or fsdp: weights, gradients and optimizer sharded over all ranks
    precision: str = "32-true"  # or bf16-mixed: compute in bfloat16, weights as model.dtype says
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    compile: bool = False  # torch.compile for each block: minutes at the start, faster steps
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # the newest ones
    validate_every: int = 0  # steps between validations, and after the last step; 0: never
    best_metric: str | None = None  # such as val/NAME/kl: its best step is kept as checkpoints/best.ckpt
    best_mode: str = "min"  # min or max
    loggers: list[str] = field(default_factory=lambda: ["tensorboard", "jsonl"])  # some of LOGGERS
    log_every: int = 10  # steps between points in TensorBoard and metrics.jsonl
    watchdog_s: float = 600.0  # a rank whose step takes longer reports where it waits
    timeout_s: float = 1800.0  # a rank that waits longer for the others fails (strategies ddp and fsdp)

    def __post_init__(self) -> None:
        counts = ("max_steps", "num_nodes", "checkpoint_every", "keep_checkpoints", "log_every")
        is_number = self.devices.isdecimal() and int(self.devices) > 0
        check_settings(
            "trainer",
            self,
            # float16 needs loss scaling, other precisions change the dtype of weights.
            precision=(self.precision in ("32-true", "bf16-mixed"), "32-true or bf16-mixed"),
            strategy=(self.strategy in ("auto", "ddp", "fsdp"), "auto, ddp or fsdp"),
            devices=(self.devices == "auto" or is_number, "auto or a number, 1 or more"),
            validate_every=(self.validate_every >= 0, "0 or more"),
            best_mode=(self.best_mode in ("min", "max"), "min or max"),
            loggers=(set(self.loggers) <= set(LOGGERS), f"some of {', '.join(LOGGERS)}"),
            watchdog_s=(self.watchdog_s > 0, "more than 0 seconds"),
            timeout_s=(self.timeout_s > 0, "more than 0 seconds"),
            **{name: (getattr(self, name) >= 1, "1 or more") for name in counts},
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The sections that all stages share; `vico_pl.config.RunConfig` adds one per stage."""

    stage: str  # pretrain, consistency or router
    run_dir: str  # folder of the run; the same command with the same folder resumes it
    seed: int = 0  # of the order of samples, of drawn ratios, dropout and new weights
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def section_of(run: RunSettings, kind: type[Section]) -> Section:
    """Return a stage's own section of a recipe, by its type."""
    return next(value for value in vars(run).values() if isinstance(value, kind))
