"""What lmms-eval asks, as arguments of `Predictor.generate`, and how lmms-eval finds the model.

lmms-eval is no dependency: `lmms_model.py` alone imports it, and lmms-eval alone loads that.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.inference.generate import OPTIONS

# lmms-eval adds this to tasks without `until`, and answers in paragraphs would end after the first.
_ADDED_UNTIL = "\n\n"


def manifest() -> Any:
    """Return lmms-eval's `ModelManifest` of the model; the entry point."""
    registry, path = import_module("lmms_eval.models.registry_v2"), "vico_pl.inference.lmms_model.VicoChat"
    return registry.ModelManifest(model_id="vico_pl", chat_class_path=path)


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
