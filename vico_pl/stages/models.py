"""How a stage gets its models ready: what is trained, in which dtype, and how blocks run."""

from typing import Protocol, runtime_checkable

from vico_pl.model.adapters import add_adapters
from vico_pl.model.blocks import checkpoint_blocks, compile_blocks
from vico_pl.model.packed import set_packed_attention
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.settings import DTYPES, PARTS, RunSettings


@runtime_checkable
class ModelSource(Protocol):
    """Gives a stage its models: read from folders in a run, without weights in a plan."""

    @property
    def same_weights(self) -> bool:
        """Whether policy and reference start from the same folder."""

    def policy(self) -> VisionLanguageModel:
        """Return the model to start from, with the connectors and the router that the recipe adds."""

    def reference(self) -> VisionLanguageModel:
        """Return the model that the policy is compared with."""


def prepare_policy(model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
    """Freeze what is not trained, cast what is, add adapters and set how blocks run."""
    trainable = run.model.trainable
    for name in PARTS:
        part = getattr(model, name)
        if name not in trainable:
            part.requires_grad_(requires_grad=False)
        elif run.trainer.strategy != "fsdp":  # which casts after sharding
            part.to(DTYPES[run.model.dtype])
    if "lora" in trainable:
        add_adapters(model.language, run.model.lora)
    prepare_blocks(model, run)
    if run.trainer.activation_checkpointing:
        checkpoint_blocks(model.vision)
        checkpoint_blocks(model.language)
    return model


def prepare_router(model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
    """Cast the router, which is trained alone, and set how blocks run."""
    if model.router is not None:
        model.router.to(DTYPES[run.model.dtype])
    return prepare_blocks(model, run)


def prepare_blocks(model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
    """Choose the attention kernel and compile blocks, as the recipe says."""
    set_packed_attention(model.language, run.model.attention)
    if run.trainer.compile:
        compile_blocks(model.vision)
        compile_blocks(model.language)
    return model


def freeze_reference(
    model: VisionLanguageModel, policy: VisionLanguageModel, run: RunSettings, source: ModelSource
) -> FrozenReference:
    """Freeze the reference; it uses the policy's frozen parts where both have the same weights.

    Not under fsdp: a part that two models share can be sharded for one of them only.
    """
    shares = source.same_weights and run.trainer.strategy != "fsdp"
    return FrozenReference(model, beside=policy if shares else None)
