"""vico_pl: train multimodal language models to spend vision tokens where the meaning is.

A model answers questions about images:

    from vico_pl import Predictor

    predictor = Predictor.load("runs/demo/router/model")
    answers = predictor.generate(["a.png", "b.png"], ["What is A?", "How many shapes are there?"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vico_pl.inference.generate import Answer, ImageRouting
    from vico_pl.inference.predictor import Predictor

    __version__: str

__all__ = ["Answer", "ImageRouting", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is used: `import vico_pl` alone must not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("vico_pl")
    if name in __all__:
        from vico_pl.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'vico_pl' has no attribute '{name}'; expected one of {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
