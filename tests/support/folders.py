"""Tiny model folders ready for use, and evaluation sets that they answer."""

import json
from dataclasses import asdict

import numpy as np
import torch
from torch.nn.functional import log_softmax

from tests.support.tiny import TILE, encoded_image, tiny_model, tiny_spec
from vico_pl.data.chat import ChatConfig
from vico_pl.data.collate import collate
from vico_pl.data.decode import decode_record
from vico_pl.data.shards.reader import write_index, write_shard
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.files import write_json
from vico_pl.model.families.base import CALIBRATION_NAME
from vico_pl.model.families.folder import save_model
from vico_pl.model.language import run_packed
from vico_pl.tokens import PLACEHOLDER, build_tokenizer, token_id
from vico_pl.types import Record

SKILLS = ("perception", "reasoning", "ocr")
SIZES = (
    (32, 32),
    (64, 64),
    (64, 32),
    (32, 64),
)  # width, height: 1 tile, 2 x 2, 2 x 1 and 1 x 2 with thumbnail
QUESTIONS = [f"What is {letter}?" for letter in "ABCDEFGH"]


def fixed_tokenizer():
    """A tokenizer that does not change with GlyphDocs' words: the answers below depend on it."""
    return build_tokenizer(["What is the value of A?", "red green blue", "How many shapes?"], vocab_size=300)


def write_model_folder(folder, *, threshold=None, ends=True, **changes):
    """Write a model folder of a random model whose answers mostly end after a few tokens, or never."""
    tokenizer = fixed_tokenizer()
    language = {**tiny_spec().language, "vocab_size": len(tokenizer)}
    spec = {"language": language, "placeholder_id": token_id(tokenizer, PLACEHOLDER), **changes}
    model = tiny_model(**spec)
    with torch.no_grad():
        model.head[tokenizer.eos_token_id] *= 5 if ends else 0
        if model.router is not None:
            model.router.gating.gate[1].weight *= 3  # P(compress) of different tiles lies far apart
    tokenizer.save_pretrained(folder)
    tiling = TilingConfig(tile_size=TILE, max_tiles=4)
    save_model(model, folder, processing={"tiling": asdict(tiling), "chat": asdict(ChatConfig())})
    if threshold is not None:
        write_json({"threshold": threshold}, folder / CALIBRATION_NAME)
    return folder


def tiled(session, *sizes, seed=0, question="What is it?"):
    """A sample with one noisy image of each size (width, height)."""
    files = {f"{i}.png": encoded_image("PNG", size=size, seed=100 * seed + i) for i, size in enumerate(sizes)}
    turns = [{"from": "human", "value": "<image>\n" * len(sizes) + question}, {"from": "gpt", "value": "red"}]
    files["json"] = json.dumps({"conversations": turns}).encode()
    decoded = decode_record(Record(shard="a.tar", key=f"{seed:08d}", files=files))
    return tile_sample(decoded, session.tiling)


def full_ratios(*samples):
    return [torch.full((len(sample.tiles),), 4) for sample in samples]


def own_answers(session, sample, questions, *, max_tokens=6):
    """What the model answers at full tokens, for the questions whose answer ends and says something."""
    features = [session.model.encode_tiles(sample.tiles)] * len(questions)
    ids = session.generate_ids(
        [sample] * len(questions),
        questions,
        features=features,
        ratios=full_ratios(*[sample] * len(questions)),
        max_new_tokens=max_tokens,
    )
    texts = [text.strip() for text in session.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    ended = (ids == session.tokenizer.eos_token_id).any(1).tolist()
    return {q: text for q, text, end in zip(questions, texts, ended, strict=True) if end and text}


def answered_records(session, *, count, seed=0):
    """Records whose expected answers are the model's own at full tokens: it gets all of them right."""
    for position in range(count):
        sample = tiled(session, SIZES[position % len(SIZES)], seed=seed + position)
        known = list(own_answers(session, sample, QUESTIONS).items())[:3]
        turns = []
        for number, (question, answer) in enumerate(known):
            mark = "" if number else "<image>\n"
            turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        if not turns:  # a sample without a question that counts
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "?"}]
        skills = [SKILLS[(position + i) % 3] for i in range(len(known))]
        size, image_seed = SIZES[position % len(SIZES)], 100 * (seed + position)
        yield (
            f"{position:08d}",
            {
                "png": encoded_image("PNG", size=size, seed=image_seed),
                "json": json.dumps({"conversations": turns, "skills": skills}).encode(),
            },
        )


def write_set(folder, records):
    """Write records as a folder of one shard."""
    write_shard(folder / f"{folder.name}-000000.tar", records)
    write_index(folder)
    return folder


def router_probabilities(session, folder):
    """P(compress) of every tile of a set, by hand."""
    found = []
    for sample in session.samples(folder):
        with torch.no_grad():
            logits = session.model.router(session.model.encode_tiles(sample.tiles))
        found += (1 - logits.softmax(-1)[:, -1]).tolist()
    return np.array(found)


@torch.no_grad()
def log_probabilities(session, sample, ratios):
    """Log-probabilities of a sample's response tokens from one forward pass, float64 (R, V)."""
    batch = collate([session.chat.encode(sample)])
    spliced = session.model.splice_batch(batch, session.model.encode_tiles(sample.tiles), ratios)
    states = run_packed(session.model.language, spliced.embeddings, spliced.segment_lengths)
    return log_softmax((states[spliced.response_positions] @ session.model.head.T).double(), -1)


def tree(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
