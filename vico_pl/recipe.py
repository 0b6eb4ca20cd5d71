"""Everything a recipe can say: `config.yaml` of a run folder is one of these."""

from dataclasses import dataclass, field

from vico_pl.stages.consistency import ConsistencyConfig
from vico_pl.stages.router import RouterConfig
from vico_pl.stages.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """The common sections and one for each stage that has settings of its own."""

    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
