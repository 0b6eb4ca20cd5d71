"""A recipe becomes a checked `RunConfig`: dataclass defaults <- recipe <- `key=value`. Opens no model."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vico_pl.data.shards.locations import without_secrets
from vico_pl.files import atomic_path
from vico_pl.stages import STAGES
from vico_pl.stages.consistency import ConsistencyConfig
from vico_pl.stages.labels import RouterConfig
from vico_pl.stages.settings import TRAINABLE_PARTS, RunSettings

# Settings that change no result, so that a run may resume with other values.
HARMLESS = (
    "data.num_workers",
    "data.micro_batch.max_tiles",
    "data.micro_batch.max_tokens",
    "data.streaming.cache_dir",
    "data.streaming.cache_gib",
    "data.validation",
    "trainer.accelerator",
    "trainer.activation_checkpointing",
    "trainer.best_metric",
    "trainer.best_mode",
    "trainer.checkpoint_every",
    "trainer.devices",
    "trainer.keep_checkpoints",
    "trainer.log_every",
    "trainer.loggers",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.timeout_s",
    "trainer.validate_every",
    "trainer.watchdog_s",
)
# Keys of earlier versions, which run folders still hold: (section, old key) -> new key; None: removed.
OLD_KEYS = {
    ("data", "packs"): "micro_batch",
    ("consistency", "reference_cache"): None,
    ("consistency", "reference_cache_gib"): None,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """All settings of a recipe: the common sections, and one for each stage that has its own."""

    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    router: RouterConfig = field(default_factory=RouterConfig)


def load_config(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """Merge a recipe and `key=value` overrides over the defaults.

    Raises:
        ValueError: the recipe cannot be read, or keys, types or values are wrong; the message lists all.
    """
    return parse_config(read_settings(recipe, overrides), name=str(recipe))


def read_settings(recipe: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a recipe and merge `key=value` overrides over it, without checking keys or values."""
    if not recipe.is_file():
        raise ValueError(f"{recipe}: no such recipe; recipes/ holds those of this project")
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise ValueError(f"expected key=value, got {', '.join(malformed)}")
    try:
        content = OmegaConf.load(recipe)
        if not isinstance(content, DictConfig):
            raise ValueError(f"{recipe}: expected a mapping of settings")
        for key, _, text in (item.partition("=") for item in overrides):
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
            # A section's settings are merged; the description of a tower replaces another one.
            OmegaConf.update(content, key, value, merge=key not in ("model.vision", "model.language"))
        return _renamed(OmegaConf.to_container(content))
    # OSError: a single word or number; RecursionError: thousands of brackets; the last three: an override
    # such as data.sources.9.path=... or stage.x=...
    except (
        OmegaConfBaseException,
        YAMLError,
        OSError,
        RecursionError,
        TypeError,
        IndexError,
        AssertionError,
    ) as error:
        raise ValueError(f"{recipe}: {' '.join(str(error).split())}") from error


def parse_config(settings: dict[str, Any], *, name: str) -> RunConfig:
    """Turn plain settings into a checked `RunConfig`."""
    missing = [f"{key} is not set" for key in ("stage", "run_dir") if settings.get(key) is None]
    problems = (
        [*_unknown_keys(settings, RunConfig), *missing]
        or list(_wrong_values(settings))
        or list(check_run(_build(settings)))
    )
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    return _build(settings)


def check_run(config: RunConfig) -> Iterator[str]:
    """Yield contradictions between sections of a configuration, a sentence each."""
    trainable, precision = config.model.trainable, config.trainer.precision
    for part in set(trainable) - set(TRAINABLE_PARTS):
        yield f"model.trainable names '{part}'; expected some of {', '.join(TRAINABLE_PARTS)}"
    if {"language", "lora"} <= set(trainable):
        yield "model.trainable names both language (all its weights) and lora (adapters only); remove one"
    if config.model.attention == "flash" and precision != "bf16-mixed":
        yield f"model.attention is 'flash' but trainer.precision is '{precision}'; set it to bf16-mixed"
    if config.stage in STAGES:
        yield from STAGES[config.stage].check(config)
    else:
        yield f"stage is '{config.stage}'; expected one of {', '.join(STAGES)}"
    yield from _check_validation(config)
    if not config.data.sources:
        yield "data.sources is empty; name at least one folder of shards"
    fed = sum(source.steps or 0 for source in config.data.sources[:-1])
    if fed >= config.trainer.max_steps:
        yield f"data.sources: the last one is never reached, the others last {fed} steps"


def _check_validation(config: RunConfig) -> Iterator[str]:
    names, metric = [entry.name for entry in config.data.validation], config.trainer.best_metric
    if config.trainer.validate_every and not names:
        yield "trainer.validate_every is set but data.validation is empty; name a set of held-out shards"
    if metric is not None and not config.trainer.validate_every:
        yield "trainer.best_metric is set but trainer.validate_every is 0; set it to a number of steps"
    elif metric is not None and not metric.startswith(tuple(f"val/{name}/" for name in names)):
        yield f"trainer.best_metric is '{metric}'; expected val/NAME/... of a set in data.validation"


def save_config(settings: RunConfig | dict[str, Any], path: Path) -> None:
    """Write settings as a recipe that gives the same run, atomically, as all ranks write it.

    References such as `${oc.env:TOKEN}` stay references. Only its owner may read a file that has a URL with
    a password or signature.
    """
    text = OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(RunConfig), settings))
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o666 if without_secrets(text) == text else 0o600)
        temporary.write_text(text)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """List the settings in which two configurations differ, except those that change no result."""
    before, after = (dict(_leaves(OmegaConf.to_container(OmegaConf.structured(c)))) for c in (old, new))
    names = [name for name in before.keys() | after.keys() if name not in HARMLESS]
    return sorted(f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n))


def _build(settings: dict[str, Any]) -> RunConfig:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), settings))  # type: ignore[return-value]


def _renamed(settings: Any) -> Any:
    """Bring keys of earlier versions up to date."""
    for (section, old), new in OLD_KEYS.items():
        values = settings.get(section)
        if isinstance(values, dict) and old in values:
            value = values.pop(old)
            if new is not None:
                values.setdefault(new, value)
    return settings


def _unknown_keys(settings: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[str]:
    known = {f.name for f in fields(schema)}
    hints = get_type_hints(schema)
    for key, value in settings.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            yield f"unknown key {prefix}{key}" + (f" (did you mean {prefix}{close[0]}?)" if close else "")
            continue
        inner = next((t for t in (hints[key], *get_args(hints[key])) if is_dataclass(t)), None)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if inner is not None and isinstance(item, Mapping):
                place = f"{key}.{index}" if isinstance(value, list) else key
                yield from _unknown_keys(item, inner, f"{prefix}{place}.")


def _wrong_values(settings: Mapping[str, Any]) -> Iterator[str]:
    """Merge section by section, so that all wrong values are reported, not only the first."""
    base = {key: settings[key] for key in ("stage", "run_dir")}
    for key, value in settings.items():
        try:
            _build({**base, key: value})
        except OmegaConfBaseException as error:
            yield f"{error.full_key or key}: {str(error).splitlines()[0]}"
        except ValueError as error:
            yield str(error)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
