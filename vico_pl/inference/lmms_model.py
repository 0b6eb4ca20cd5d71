"""The model as lmms-eval loads it: `lmms-eval --model vico_pl --model_args pretrained=MODEL`."""

from collections.abc import Sequence
from dataclasses import replace
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
from vico_pl.model.router import NEVER, RoutingRule


class AnswerTokens(TokenCounts):
    """Tokens of a request, which lmms-eval writes into its log of samples."""

    def __init__(self, answer: Answer) -> None:
        """Count those of an answer."""
        super().__init__(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens)
        full = answer.full_vision_tokens  # without compression
        self._vision = {"vision_tokens": answer.vision_tokens, "full_vision_tokens": full}

    def to_dict(self) -> dict[str, int | None]:
        """Return what the log gets."""
        return {**super().to_dict(), **self._vision}


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
        threshold: float | int | None = None,  # P(compress) to compress a tile at; None: as calibrated
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
            rule = self.predictor.rule or RoutingRule(threshold=NEVER)
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
        size, answers = self.batch_size, dict[int, Answer]()
        with tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as progress:
            for batch in (
                group[i : i + size] for group in groups.values() for i in range(0, len(group), size)
            ):
                answers.update(zip(batch, self._answer([requests[i].args for i in batch]), strict=True))
                progress.update(len(batch))
        found = (answers[number] for number in range(len(requests)))
        return [GenerationResult(answer.text, AnswerTokens(answer)) for answer in found]

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[Answer]:
        """Answer requests with the same settings."""
        settings = generation_settings(batch[0][2], max_new_tokens=self.max_new_tokens)
        try:
            chats = [to_messages(self.task_dict[t][s][n]) for _, to_messages, _, n, t, s in batch]
            images, prompts = zip(*map(read_messages, chats), strict=True)
            return self.predictor.generate(images, prompts, batch_size=len(batch), **settings)
        except ValueError as error:
            documents = ", ".join(f"{task} {number}" for *_, number, task, _ in batch)
            raise ValueError(f"documents {documents}: {error}") from error

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse what needs probabilities of given texts, as chat models of lmms-eval do."""
        raise NotImplementedError("vico_pl only answers tasks of output_type generate_until")

    generate_until_multi_round = loglikelihood
