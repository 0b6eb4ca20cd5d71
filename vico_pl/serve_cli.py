"""The commands `vico serve` and `vico embed`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo

Model = Annotated[str, Argument(help="Model folder in any layout, or a name on the Hugging Face Hub.")]

NOTICE = "for trying out and for evaluation harnesses, not for production: see docs/serving.md"


def serve(
    model: Model,
    port: Annotated[int, Option(min=1, max=65535, help="Port.")] = 8000,
    host: Annotated[str, Option(help="Address to listen at. Default: this machine alone.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, Option(envvar="VICO_API_KEY", help="Key that clients must send.", show_envvar=True)
    ] = None,
    model_name: Annotated[str | None, Option(help="Name for clients. Default: MODEL as given.")] = None,
    image_dir: Annotated[
        Path | None, Option(exists=True, file_okay=False, help="Folder whose image files clients may name.")
    ] = None,
    max_body_mb: Annotated[float, Option(min=0, help="Most megabytes of a request.")] = 32,
    max_images: Annotated[int, Option(min=1, help="Most images of a request.")] = 16,
    max_pixels: Annotated[int, Option(min=1, max=178_956_970, help="Most pixels of an image.")] = 50_000_000,
    max_tokens: Annotated[int, Option(min=1, help="Most new tokens of an answer.")] = 4096,
    max_waiting: Annotated[int, Option(min=1, help="Most requests under way; others get a 503.")] = 64,
    timeout: Annotated[float, Option(min=0, help="Seconds until a request is given up (504).")] = 120,
) -> None:
    """Answer OpenAI's chat requests, and show routed images in the browser.

    Example: vico serve runs/demo/router/model --port 8000, then open http://127.0.0.1:8000/

    For trying out and for evaluation harnesses, not for production.
    """
    from vico_pl.inference.predictor import Predictor

    try:
        import uvicorn

        from vico_pl.inference.protocol import ServeConfig
        from vico_pl.inference.server import build_app
    except ModuleNotFoundError as error:
        raise ValueError(f"vico serve needs {error.name}: pip install 'vico_pl[serve]'") from error
    config = ServeConfig(
        model_name=model_name or model,
        api_key=api_key,
        image_dir=image_dir,
        max_bytes=int(max_body_mb * 1e6),
        max_images=max_images,
        max_pixels=max_pixels,
        max_tokens=max_tokens,
        max_waiting=max_waiting,
        timeout_s=timeout,
    )
    app = build_app(Predictor.load(model), config)
    echo(f"{model} is served at http://{host}:{port}/ ({NOTICE})")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def embed(
    model: Model,
    image: Annotated[Path, Argument(help="Image file, or a folder of them.")],
    output: Annotated[Path, Option(help="File to write (.safetensors); for a folder, the folder to write.")],
) -> None:
    """Write the routed vision tokens of images, which vLLM takes in their place (docs/serving.md)."""
    from vico_pl.inference.predictor import Predictor
    from vico_pl.inference.responses import embed_image

    written = {path: output / f"{path.name}.safetensors" for path in image_files([image])}
    written = written if image.is_dir() else {image: output}
    session, spent, full = Predictor.load(model), 0, 0
    for path, target in written.items():
        counts = embed_image(session, path, target)
        spent, full = spent + counts[0], full + counts[1]
    echo(f"{len(written)} images: {spent} of {full} vision tokens; {output} is written")


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the image files in them."""
    from vico_pl.data.decode import IMAGE_EXTENSIONS

    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in inside if file == path or file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
        if not files:
            raise ValueError(f"{path}: no image in this folder; expected {', '.join(IMAGE_EXTENSIONS)} files")
        found += files
    return found
