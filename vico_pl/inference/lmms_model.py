"""The model as lmms-eval loads it: `lmms-eval --model vico_pl --model_args pretrained=MODEL`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm

from vico_pl.inference.generate import Answer
from vico_pl.inference.lmms import generation_settings, read_messages
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import RoutingRule


@dataclass(kw_only=True)
class VisionTokenCounts(TokenCounts):
    """Tokens of a request, which lmms-eval writes into its log of samples."""

    vision_tokens: int  # part of input_tokens
    full_vision_tokens: int  # what they would be without compression

    def to_dict(self) -> dict[str, int | None]:
        """Return what the log gets."""
        vision = {"vision_tokens": self.vision_tokens, "full_vision_tokens": self.full_vision_tokens}
        return {**super().to_dict(), **vision}


class VicoChat(lmms):
    """A model folder, or a name on the Hub, that answers lmms-eval's requests; routed if calibrated."""

    is_simple = False

    def __init__(
        self,
        *,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 1024,  # where a task sets none
        threshold: float | None = None,  # P(compress) from which a tile is compressed; None: as calibrated
    ) -> None:
        """Load the model, in runs of several ranks on the device of this one.

        Raises:
            ValueError: the model cannot be loaded, or an argument is invalid.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size is {batch_size}; expected a whole number from 1")
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own_device = "auto" if self._world_size == 1 else str(self.accelerator.device)
        self.predictor = Predictor.load(str(pretrained), device=device or own_device)
        self.device: torch.device = self.predictor.device  # of what ranks exchange
        if threshold is not None:
            if self.predictor.model.router is None:
                raise ValueError(f"threshold is {threshold}, but {pretrained} has no router")
            rule = self.predictor.rule or RoutingRule(threshold=threshold)
            self.predictor = replace(self.predictor, rule=replace(rule, threshold=float(threshold)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "VicoChat":
        """Build the model from `--model_args`, which win over `--batch_size`; lmms-eval always passes one."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**options, **simple_parse_args_string(arg_string)})

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer the requests of this rank; those with the same settings run in batches."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(number)
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as progress:
            for numbers in groups.values():
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    answers = self._answer([requests[number] for number in batch])
                    results.update(zip(batch, map(_result, answers), strict=True))
                    progress.update(len(batch))
        return [results[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[Answer]:
        asked = [self._read(*request.args) for request in requests]
        images, prompts = [images for images, _ in asked], [texts for _, texts in asked]
        settings = generation_settings(requests[0].args[2], max_new_tokens=self.max_new_tokens)
        return self.predictor.generate(images, prompts, batch_size=len(prompts), **settings)

    def _read(
        self, _: str, to_messages: Any, __: Any, document: int, task: str, split: str
    ) -> tuple[list[Any], list[str]]:
        try:
            return read_messages(to_messages(self.task_dict[task][split][document]))
        except ValueError as error:
            raise ValueError(f"{task}, document {document}: {error}") from error

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse what needs probabilities of given texts, as chat models of lmms-eval do."""
        raise NotImplementedError("vico_pl only answers tasks of output_type generate_until")

    generate_until_multi_round = loglikelihood


def _result(answer: Answer) -> GenerationResult:
    counts = VisionTokenCounts(
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.new_tokens,
        vision_tokens=answer.vision_tokens,
        full_vision_tokens=answer.full_vision_tokens,
    )
    return GenerationResult(text=answer.text, token_counts=counts)
