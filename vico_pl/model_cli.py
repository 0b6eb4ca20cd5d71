"""The commands that use a model: `vico route`, `generate`, `embed` and `serve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, echo

from vico_pl.shards_cli import report_faults

Model = Annotated[str, Argument(help="Model folder in any layout, or a name on the Hugging Face Hub.")]

NOTICE = "for trying out and for evaluation harnesses, not for production: see docs/serving.md"


def route(
    model: Model,
    image: Annotated[Path, Argument(help="JPEG, PNG or WebP file.")],
    output: Annotated[Path, Option(help="File to write.")],
) -> None:
    """Draw which tiles of an image keep full vision tokens.

    Example: vico route runs/demo/router/model photo.jpg --output routed.png
    """
    from vico_pl.data.decode import read_image
    from vico_pl.evaluation.report import routing_picture

    pixels, session = read_image(image), open_model(model)
    if session.model.router is None or session.rule is None:
        raise ValueError(f"{model}: no calibrated router; run 'vico calibrate' on a model of stage router")
    ratios = session.route(pixels).ratios
    output.parent.mkdir(parents=True, exist_ok=True)
    routing_picture(session, pixels, ratios, caption=image.name).save(output)
    num_compressed = sum(ratio > session.model.ratios[0] for ratio in ratios)
    echo(f"{num_compressed} of {len(ratios)} tiles compressed; {output} is written")


def generate(
    model: Model,
    images: Annotated[
        list[Path] | None, Argument(help="JPEG, PNG or WebP files, and folders of such; each gets an answer.")
    ] = None,
    prompt: Annotated[
        str | None,
        Option(help="Question; with --data it replaces those of the records, which need no JSON then."),
    ] = None,
    together: Annotated[bool, Option("--together", help="Ask once about all images.")] = False,
    data: Annotated[str | None, Option(help="Shards with questions to answer, instead of images.")] = None,
    output: Annotated[Path | None, Option(help="With --data: folder of new shards with the answers.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Length limit of an answer, in tokens.")] = 128,
    batch_size: Annotated[int, Option(min=1, help="Questions that run together.")] = 8,
    samples_per_shard: Annotated[
        int, Option(min=1, help="With --data: most records per tar, and most that are lost at a kill.")
    ] = 1000,
    temperature: Annotated[float | None, Option(min=0, help="Sample; default and 0: greedy.")] = None,
    top_p: Annotated[
        float | None, Option(min=0.01, max=1, help="Sample from the likeliest tokens up to this probability.")
    ] = None,
) -> None:
    """Answer a question about images, or those of a set of shards, routed if the model is calibrated.

    Example: vico generate runs/demo/router/model photo.jpg --prompt "How many shapes are there?"
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    sampling = {"temperature": temperature, "top_p": top_p}
    settings |= {name: value for name, value in sampling.items() if value is not None}
    if data is not None and output is not None and not images and not together:
        from vico_pl.inference.responses import generate_responses

        settings |= {"prompt": prompt, "samples_per_shard": samples_per_shard}
        index, faults = generate_responses(open_model(model), data, output, **settings)
        echo(f"{output}: {index.num_samples} samples in {len(index.names)} shards")
        report_faults(faults)
    elif images and prompt is not None and data is None and output is None:
        paths, session = image_files(images), open_model(model)
        asked: list[Any] = [paths] if together else paths
        for start in range(0, len(asked), batch_size):  # to print answers as they come
            batch = asked[start : start + batch_size]
            answers = session.generate(batch, [prompt] * len(batch), **settings)
            for image, answer in zip(batch, answers, strict=True):
                echo(answer.text if len(asked) == 1 else f"{image}:\n{answer.text}\n")
    else:
        raise ValueError("expected images with --prompt, or --data with --output; see 'vico generate --help'")


def embed(
    model: Model,
    image: Annotated[Path, Argument(help="Image file, or a folder of them.")],
    output: Annotated[Path, Option(help="File to write (.safetensors); for a folder, the folder to write.")],
) -> None:
    """Write the routed vision tokens of images, which vLLM takes in their place (docs/serving.md).

    Example: vico embed runs/demo/router/model photos --output embeddings
    """
    from vico_pl.inference.predictor import Predictor
    from vico_pl.inference.responses import embed_image

    written = {path: output / f"{path.name}.safetensors" for path in image_files([image])}
    written = written if image.is_dir() else {image: output}
    session, spent, full = Predictor.load(model), 0, 0
    for path, target in written.items():
        counts = embed_image(session, path, target)
        spent, full = spent + counts[0], full + counts[1]
    echo(f"{len(written)} images: {spent} of {full} vision tokens; {output} is written")


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


def open_model(model: str) -> Any:
    """Load a model folder, downloaded if it is on the Hub."""
    from vico_pl.inference.predictor import Predictor

    return Predictor.load(model)


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
