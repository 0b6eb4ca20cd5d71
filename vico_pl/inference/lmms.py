"""The model for lmms-eval: `lmms-eval --model vico_pl --model_args pretrained=MODEL`.

lmms-eval is no dependency: it alone loads this module.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.inference.generate import OPTIONS, Answer
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import NEVER, RoutingRule

# lmms-eval adds this to tasks without `until`, and answers in paragraphs would end after the first.
_ADDED_UNTIL = "\n\n"


def manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model; the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest  # whose package calls this while it is imported

    return ModelManifest(model_id="vico_pl", chat_class_path=f"{__name__}.{VicoChat.__name__}")


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[str]]:
    r"""Return the images and texts of a chat; the text of a system message begins the next question.

    >>> parts = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "How many?"}]
    >>> read_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
    (['a.png'], ['Be brief.\n<image>\nHow many?'])

    Raises:
        ValueError: a part is neither text nor image, or the messages are not questions and answers in turn.
    """
    images: list[Any] = []
    turns: list[tuple[str, list[str]]] = []  # role and parts; neighbours of the same role are joined
    for message in messages:
        role = message["role"].replace("system", "user")  # the model's own system message stays as trained
        content = message["content"]
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] not in ("text", "image"):
                raise ValueError(f"a message has a part of type '{part['type']}'; expected text or image")
            images += [part["url"]] if part["type"] == "image" else []
            # A mark within a text is none of an image.
            text = IMAGE_TOKEN if part["type"] == "image" else part["text"].replace(IMAGE_TOKEN, "").strip()
            turns[-1][1].append(text)
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        given = " ".join(roles) or "nobody"
        raise ValueError(f"the messages are of {given}; expected user and assistant in turn, user last")
    return images, ["\n".join(filter(None, parts)) for _, parts in turns]


def generation_settings(gen_kwargs: Mapping[str, Any], *, max_new_tokens: int) -> dict[str, Any]:
    r"""Return a task's settings as arguments of `Predictor.generate`; what has no effect warns.

    `max_new_tokens` is for tasks that set none. As with other models there, a temperature above 0 samples
    unless `do_sample` is false; without a temperature, `do_sample` decides.

    >>> generation_settings({"until": ["\n\n", "Q:"], "temperature": 0, "num_beams": 1}, max_new_tokens=9)
    {'max_new_tokens': 9, 'stop_strings': ('Q:',), 'temperature': 0, 'do_sample': False}
    """
    given = {"until": (), **{name: value for name, value in gen_kwargs.items() if value is not None}}
    until = given["until"] if isinstance(given["until"], list | tuple) else [str(given["until"])]
    samples = given.get("do_sample", True) and float(given.get("temperature", "do_sample" in given)) > 0
    unused = given.keys() - {*OPTIONS, "until", "max_new_tokens", "num_beams"}
    if unused or given.get("num_beams", 1) != 1:
        warnings.warn(
            f"of generation_kwargs, {', '.join(sorted(unused)) or 'num_beams'} has no effect", stacklevel=2
        )
    return {
        "max_new_tokens": int(given.get("max_new_tokens", max_new_tokens)),
        "stop_strings": tuple(text for text in until if text and text != _ADDED_UNTIL),
        **{name: given[name] for name in OPTIONS if name in given},
        "do_sample": bool(samples),
    }


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
