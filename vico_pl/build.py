"""A recipe becomes models, and the stage that trains them."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vico_pl.data.glyphs import question_words
from vico_pl.data.packing import SampleCost
from vico_pl.model.adapters import add_adapters
from vico_pl.model.assemble import assemble_model
from vico_pl.model.blocks import checkpoint_blocks, compile_blocks
from vico_pl.model.families.folder import load_model
from vico_pl.model.families.hub import local_folder
from vico_pl.model.flops import count_flops
from vico_pl.model.language import set_packed_attention
from vico_pl.model.reference import FrozenReference
from vico_pl.model.reference_cache import ReferenceCache, fingerprint
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.recipe import DTYPES, PARTS, ModelConfig, RunConfig
from vico_pl.stages.base import Stage
from vico_pl.stages.consistency import ConsistencyStage
from vico_pl.stages.cost import ConsistencyCost, PretrainCost, RouterCost
from vico_pl.stages.pretrain import PretrainStage
from vico_pl.stages.router import RouterStage
from vico_pl.tokens import PLACEHOLDER, build_tokenizer, extend_tokenizer, load_tokenizer, token_id


def build_run_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the model to start from, or make one for GlyphDocs."""
    if config.path is not None:
        return load_tokenizer(_folder(config))
    if "path" in config.language:
        return extend_tokenizer(config.language["path"], revision=config.language.get("revision"))
    return build_tokenizer(question_words(), vocab_size=config.vocab_size)


def build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """Build the stage that the recipe names, with its models."""
    stage = _build_stage(config, tokenizer)
    if config.trainer.strategy == "fsdp":
        stage.trained_dtype = DTYPES[config.model.dtype]
    return stage


def _build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Stage:
    settings, optim, num_steps = config.model, config.optim, config.trainer.max_steps
    if config.stage == "pretrain":
        model = _prepare_policy(_starting_model(settings, tokenizer), config)
        return PretrainStage(model, optim, num_steps=num_steps)
    policy = _starting_model(settings, tokenizer)
    start, compared = _folder(settings), _folder(settings, settings.reference)
    original = _set_speed(load_model(compared, dtype=DTYPES[settings.frozen_dtype]), config)
    # A part that two models share can be split over ranks for one of them only.
    shares = start == compared and config.trainer.strategy != "fsdp"
    if config.stage == "consistency":
        policy = _prepare_policy(policy, config)
        cache = _open_cache(original, config)  # before the reference takes over parts of the policy
        reference = FrozenReference(original, beside=policy if shares else None, cache=cache)
        return ConsistencyStage(
            policy, reference, config.consistency, optim, num_steps=num_steps, seed=config.seed
        )
    frozen_policy = FrozenReference(_prepare_router(policy, config))
    reference = FrozenReference(original, beside=policy if shares else None)  # shares what is frozen
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


def load_trained(
    state: dict[str, Tensor], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> VisionLanguageModel:
    """Build the trained model in one piece from weights that were split over ranks."""
    prepare = _prepare_router if config.stage == "router" else _prepare_policy
    model = prepare(_starting_model(config.model, tokenizer), config)
    model.load_state_dict(state, assign=True)  # in the types that training gave them
    model.language.tie_weights()  # loading replaced one of the two
    return model


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


def _open_cache(reference: VisionLanguageModel, config: RunConfig) -> ReferenceCache | None:
    """Open the cache of the reference's states, if there shall be one."""
    settings = config.consistency
    if settings.reference_cache is None:
        return None
    name = fingerprint(reference, precision=config.trainer.precision, attention=config.model.attention)
    return ReferenceCache(
        Path(settings.reference_cache).expanduser(),
        fingerprint=name,
        width=reference.head.shape[1],
        max_gib=settings.reference_cache_gib,
    )


def _prepare_policy(model: VisionLanguageModel, config: RunConfig) -> VisionLanguageModel:
    """Choose what is trained of a model and how its blocks run."""
    trainable = config.model.trainable
    for name in PARTS:
        part = getattr(model, name)
        if name in trainable:
            if config.trainer.strategy != "fsdp":  # there it is done once they are split
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


def _prepare_router(model: VisionLanguageModel, config: RunConfig) -> VisionLanguageModel:
    """Choose the type of the router, which is trained alone, and how blocks run."""
    if model.router is not None:
        model.router.to(DTYPES[config.model.dtype])
    return _set_speed(model, config)


def _set_speed(model: VisionLanguageModel, config: RunConfig) -> VisionLanguageModel:
    set_packed_attention(model.language, config.model.attention)
    if config.trainer.compile:
        compile_blocks(model.vision)
        compile_blocks(model.language)
    return model
