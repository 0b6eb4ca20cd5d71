"""The models of a run, built from its recipe as the trainer does, but without weights."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from vico_pl.model.adapters import add_adapters
from vico_pl.model.flops import build_without_weights
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.planning.meter import METERED_ATTENTION, autocast_on_meta
from vico_pl.recipe import RunConfig
from vico_pl.stages.settings import DTYPES, PARTS, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What is known of the model that a run starts from."""

    name: str  # where its shape was found
    spec: ModelSpec
    dtype: torch.dtype  # of the weights in the folder


@dataclass(frozen=True, kw_only=True)
class RunModels:
    """The models of a run; parts that both share count once."""

    policy: VisionLanguageModel
    reference: FrozenReference | None  # none: the stage has no reference

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of both, each once."""
        networks = [self.policy] if self.reference is None else [self.policy, self.reference.model]
        return list({id(p): p for network in networks for p in network.parameters()}.values())

    def shared(self) -> list[nn.Parameter]:
        """Return the parameters of the policy that serve the reference too, without adapters."""
        if self.reference is None:
            return []
        own = {id(parameter) for parameter in self.policy.parameters() if not parameter.requires_grad}
        return [p for p in self.reference.model.parameters() if id(p) in own]

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that get gradients."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]


def with_routing(spec: ModelSpec, config: ModelConfig) -> ModelSpec:
    """Return the shape of the model with the connectors and the router that a recipe adds."""
    return replace(spec, ratios=config.ratios, router_heads=spec.router_heads or config.router_heads)


def build_models(config: RunConfig, source: ModelSource) -> RunModels:
    """Build the models of a run."""
    build = {"pretrain": _pretrain, "consistency": _consistency, "router": _router}[config.stage]
    with autocast_on_meta():  # adapters of experts run while they are made
        return build(config, source)


def _pretrain(config: RunConfig, source: ModelSource) -> RunModels:
    return RunModels(policy=_trained_policy(config, source), reference=None)


def _consistency(config: RunConfig, source: ModelSource) -> RunModels:
    policy = _trained_policy(config, source)
    if policy.router is not None:
        policy.router.requires_grad_(requires_grad=False)
    return RunModels(policy=policy, reference=_reference(config, source, policy))


def _router(config: RunConfig, source: ModelSource) -> RunModels:
    policy = _frozen_model(config, source, with_routing(source.spec, config.model))
    reference = _reference(config, source, policy)
    if policy.router is not None:
        policy.router.to(DTYPES[config.model.dtype]).requires_grad_()
    return RunModels(policy=policy, reference=reference)


def _trained_policy(config: RunConfig, source: ModelSource) -> VisionLanguageModel:
    model = _typed(with_routing(source.spec, config.model), _frozen_type(config, source))
    for name in PARTS:
        part = getattr(model, name)
        if name in config.model.trainable:
            part.to(DTYPES[config.model.dtype] or source.dtype)
        else:
            part.requires_grad_(requires_grad=False)
    if "lora" in config.model.trainable:
        add_adapters(model.language, config.model.lora)
    return model.train()


def _reference(config: RunConfig, source: ModelSource, policy: VisionLanguageModel) -> FrozenReference:
    """Build the reference; it shares frozen parts with a policy that starts from the same weights."""
    compared = config.model.reference or config.model.path
    original = _frozen_model(config, source, source.spec)
    return FrozenReference(original, beside=policy if compared == config.model.path else None)


def _frozen_model(config: RunConfig, source: ModelSource, spec: ModelSpec) -> VisionLanguageModel:
    return _typed(spec, _frozen_type(config, source)).requires_grad_(requires_grad=False).eval()


def _frozen_type(config: RunConfig, source: ModelSource) -> torch.dtype:
    return DTYPES[config.model.frozen_dtype] or source.dtype


def _typed(spec: ModelSpec, dtype: torch.dtype) -> VisionLanguageModel:
    model = build_without_weights(spec).to(dtype)
    model.language.packed_attention = METERED_ATTENTION  # type: ignore[assignment]  # nn.Module: or a tensor
    if model.router is not None:
        model.router.float()  # a fresh one always is
    return model
