"""What a recipe says, as dataclasses: everything that a run is made from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vico_pl.data.module import DataConfig
from vico_pl.model.adapters import LoraConfig
from vico_pl.model.language import PACKED_ATTENTION
from vico_pl.optim import OptimConfig
from vico_pl.stages.consistency import ConsistencyConfig
from vico_pl.stages.router import RouterConfig

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
    strategy: str = "auto"  # auto, ddp, or fsdp: weights, gradients and optimizer split over all ranks
    precision: str = "32-true"  # or bf16-mixed: computed in bfloat16, weights kept as model.dtype says
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more time
    compile: bool = False  # torch.compile for each block: minutes at the start, faster steps
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2
    log_every: int = 10  # steps between points in TensorBoard and metrics.jsonl
    watchdog_s: float = 600.0  # a rank whose step takes longer says where it waits
    timeout_s: float = 1800.0  # a rank that waits longer for the others gives up (strategies ddp and fsdp)

    def __post_init__(self) -> None:
        """Refuse other precisions: float16 needs its loss scaled, others turn weights into another type."""
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision is '{self.precision}'; expected 32-true or bf16-mixed")


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


def settings_without_effect(config: RunConfig) -> Iterator[str]:
    """Yield what a recipe sets in vain, in a sentence each."""
    trains_parts, lora = config.stage != "router", config.model.lora
    if lora != LoraConfig() and not (trains_parts and "lora" in config.model.trainable):
        yield "model.lora has no effect: only a stage whose model.trainable names lora has adapters"
    if config.trainer.activation_checkpointing and not trains_parts:
        yield "trainer.activation_checkpointing has no effect: stage router trains nothing before its blocks"
    consistency = config.consistency
    if consistency.kernel == "liger" and consistency.chunk_size != ConsistencyConfig().chunk_size:
        yield "consistency.chunk_size has no effect: kernel liger chooses how many logits exist at a time"
