"""What a run needs before it trains: pinned and fetched models, its folder, the tokenizer and the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vico_pl.config import (
    RunConfig,
    config_differences,
    load_config,
    parse_config,
    read_settings,
    save_config,
)
from vico_pl.data.glyphs import question_words
from vico_pl.model.families.folder import load_model, open_folder
from vico_pl.model.families.hub import local_folder, pinned
from vico_pl.model.flops import build_without_weights
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import VisionLanguageModel, assemble_model, open_clip_config
from vico_pl.stages import STAGES
from vico_pl.stages.settings import DTYPES, ModelConfig
from vico_pl.tokens import PLACEHOLDER, build_tokenizer, extend_tokenizer, load_tokenizer, token_id


def prepare_run(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a configuration and create its run folder, or find the same configuration already there.

    Raises:
        ValueError: as `complete_config`.
    """
    config, settings = _complete(recipe, overrides)
    path = Path(config.run_dir) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(settings, path)
    return config


def complete_config(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a configuration as its run will have it; writes nothing into the run folder.

    Tiling and prompt settings that the recipe leaves open come from the model to start from. A name on the
    Hugging Face Hub is pinned to its present commit; a run that has begun keeps the commit it began with.

    Raises:
        ValueError: as `load_config`; the model cannot be opened, has other ratios or sees other tiles; the
            folder holds a run with other settings.
    """
    return _complete(recipe, overrides)[0]


def _complete(recipe: Path, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration, and its settings as they are stored: references are not resolved."""
    settings = read_settings(recipe, overrides)
    given = parse_config(settings, name=str(recipe))
    path = Path(given.run_dir) / "config.yaml"
    stored = load_config(path, []) if path.exists() else None
    settings = _completed(settings, given.model, stored)
    config = parse_config(settings, name=str(recipe))
    differences = [] if stored is None else config_differences(stored, config)
    if differences:
        listed, run_dir = "; ".join(differences), config.run_dir
        model = (
            f"{run_dir}/model" if is_finished(Path(run_dir)) else "a model folder that 'vico export' makes"
        )
        remedy = f"set another run_dir, and to go on from its weights model.path: {model}"
        raise ValueError(f"{run_dir} holds a run with other settings ({listed}); {remedy}")
    side, seen = config.data.tiling.tile_size, _tile_size_of(config.model)  # before any weights are read
    if seen not in (None, side):
        raise ValueError(f"data.tiling.tile_size is {side} but the model sees tiles of {seen} pixels")
    return config, settings


@dataclass(frozen=True)
class FolderModels:
    """The models of a run, read from folders or assembled from the parts that a recipe names."""

    run: RunConfig

    @property
    def same_weights(self) -> bool:
        """Whether policy and reference start from the same folder."""
        path = self.run.model.path
        return path is not None and local_folder(path) == self._reference_folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model to start from, or one built for GlyphDocs."""
        config = self.run.model
        if config.path is not None:
            return load_tokenizer(local_folder(config.path))
        if "path" in config.language:
            return self._extended[0]
        return build_tokenizer(question_words(), vocab_size=config.vocab_size)

    def policy(self) -> VisionLanguageModel:
        """Return the model to start from, with the connectors and the router that the recipe adds."""
        config = self.run.model
        if config.path is not None:
            model = load_model(
                local_folder(config.path),
                ratios=config.ratios,
                router_heads=config.router_heads,
                connector_start=config.connector_start,
                dtype=DTYPES[config.frozen_dtype],
            )
        else:
            model = assemble_model(
                config.vision,
                config.language,
                ratios=config.ratios,
                vocab_size=len(self.tokenizer),
                placeholder_id=token_id(self.tokenizer, PLACEHOLDER),
            )
            if "path" in config.language and "language" not in config.trainable:
                model.train_tokens(self._extended[1])
        model.set_dropout(config.dropout, seed=self.run.seed)
        return model

    def reference(self) -> VisionLanguageModel:
        """Return the model that the policy is compared with; warn if it is a policy of another run."""
        ratios = open_folder(self._reference_folder).contents.spec.ratios
        if self.run.model.reference is None and len(ratios) > 1:
            rank_zero_warn(
                f"model.reference is not set and {self.run.model.path} has been trained to compress (ratios "
                f"{ratios}): it becomes its own reference; set model.reference to the model it was made from"
            )
        return load_model(self._reference_folder, dtype=DTYPES[self.run.model.frozen_dtype])

    def rule(self) -> RoutingRule | None:
        """Return the rule by which the model to start from is routed; None: it has no calibrated router."""
        path = self.run.model.path
        contents = None if path is None else open_folder(local_folder(path)).contents
        return None if contents is None or contents.spec.router_heads is None else contents.rule

    def trained(self, state: dict[str, Tensor]) -> VisionLanguageModel:
        """Return the trained model in one piece, from weights that were sharded over ranks."""
        model = STAGES[self.run.stage].prepare(self.policy(), self.run)
        model.load_state_dict(state, assign=True)  # in the dtypes of training
        model.language.tie_weights()  # loading replaced one of the two
        return model

    @cached_property
    def _extended(self) -> tuple[PreTrainedTokenizerBase, list[int]]:
        """The tokenizer of the language model that the recipe names, and the ids of tokens it lacked."""
        language = self.run.model.language
        return extend_tokenizer(language["path"], revision=language.get("revision"))

    @property
    def _reference_folder(self) -> Path:
        path = self.run.model.reference or self.run.model.path
        assert path is not None  # checked with the recipe
        return local_folder(path)


def is_finished(run_dir: Path) -> bool:
    """Say whether a run has written its model."""
    return (run_dir / "model" / "config.json").exists()


def _completed(settings: dict[str, Any], given: ModelConfig, stored: RunConfig | None) -> dict[str, Any]:
    """Pin names on the Hub to commits, and take tiling and prompt settings from the model."""
    if given.path is None:
        return settings
    model = dict(settings["model"])
    names = {key: name for key in ("path", "reference") if (name := getattr(given, key)) is not None}
    begun_with = vars(stored.model) if stored is not None else {}
    commits = {key: pinned(name, begun_with.get(key)) for key, name in names.items()}
    # What is no name on the Hub stays as it is written, such as ${oc.env:BASE}.
    model.update({key: commit for key, commit in commits.items() if commit != names[key]})
    contents = open_folder(local_folder(commits["path"])).contents
    if not set(contents.spec.ratios) <= set(given.ratios):
        found = f"{given.path} has connectors of ratios {contents.spec.ratios}"
        raise ValueError(
            f"model.ratios is {given.ratios} but {found}; set model.ratios to name these as well"
        )
    processing = contents.processing or {}
    data = dict(settings.get("data") or {})
    for part, values in processing.items():
        data[part] = {**values, **(data.get(part) or {})}
    return {**settings, "model": model, "data": data}


def _tile_size_of(config: ModelConfig) -> int | None:
    """Return the tile size of the model to start from, px; None: the recipe describes no known tower."""
    if config.path is not None:
        spec = open_folder(local_folder(config.path)).contents.spec
        return build_without_weights(spec).vision.tile_size
    named = config.vision.get("open_clip")
    known = {} if named is None else open_clip_config(named)["vision_cfg"]
    return {**known, **config.vision}.get("image_size")
