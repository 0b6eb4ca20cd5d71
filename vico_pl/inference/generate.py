"""Routed, batched, greedy generation with a key-value cache."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vico_pl.data.collate import collate
from vico_pl.data.tiling import tile_sample
from vico_pl.data.tokenizer import TURN_END, token_id
from vico_pl.inference.session import Session, question_text
from vico_pl.model.splice import Spliced
from vico_pl.types import Image, Sample, TiledSample


def answer(
    session: Session,
    samples: Sequence[TiledSample],
    questions: Sequence[str],
    *,
    features: Sequence[Float[Tensor, "_ P C"]],
    ratios: Sequence[Int64[Tensor, " _"]],
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer question i about sample i, whose tiles have `features[i]` and are seen at `ratios[i]`.

    Samples of any number of tiles, none included, share a batch; each answer is what the sample alone
    would get.
    """
    ids = generate_ids(
        session, samples, questions, features=features, ratios=ratios, max_new_tokens=max_new_tokens
    )
    return [text.strip() for text in session.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def answer_image(session: Session, image: Image, question: str, *, max_new_tokens: int = 128) -> str:
    """Answer a question about one image, with its tiles at the ratios the router chooses."""
    sample = tile_sample(Sample(id="image", images=[image], turns=[], metadata={}), session.tiling)
    features = session.encode(sample.tiles)
    ratios = session.route(features)
    (text,) = answer(
        session, [sample], [question], features=[features], ratios=[ratios], max_new_tokens=max_new_tokens
    )
    return text


@torch.no_grad()
def generate_ids(
    session: Session,
    samples: Sequence[TiledSample],
    questions: Sequence[str],
    *,
    features: Sequence[Float[Tensor, "_ P C"]],
    ratios: Sequence[Int64[Tensor, " _"]],
    max_new_tokens: int,
) -> Int64[Tensor, "B n"]:
    """Return the token ids of the answers, each up to the end of its turn and padded behind it."""
    prompts = [
        session.chat.encode_prompt(sample, question_text(question, num_images=len(sample.tiles_per_image)))
        for sample, question in zip(samples, questions, strict=True)
    ]
    batch, chosen = collate(prompts).to(session.device), torch.cat(list(ratios)).to(session.device)
    spliced = session.model.splice_batch(batch, torch.cat(list(features)), chosen)
    embeddings, attention_mask = pad_left(spliced)
    session.model.language.set_attn_implementation("sdpa")
    generate: Any = session.model.language.generate  # typed by its mixin alone
    return generate(
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # Not the tokenizer's own end of text, which in some families is another token.
        eos_token_id=token_id(session.tokenizer, TURN_END),
        pad_token_id=session.tokenizer.pad_token_id,
    )


def pad_left(spliced: Spliced) -> tuple[Float[Tensor, "B S D"], Int64[Tensor, "B S"]]:
    """Turn samples that lie end to end into rows that end together, and their attention mask."""
    rows = spliced.embeddings.split(spliced.segment_lengths)
    masks = [torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows]
    embeddings = pad_sequence(list(rows), batch_first=True, padding_side="left")
    return embeddings, pad_sequence(masks, batch_first=True, padding_side="left")
