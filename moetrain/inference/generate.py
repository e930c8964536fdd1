"""Sampling text from a trained run with a key/value cache: ``moetrain generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.config import setting
from moetrain.data import load_tokenizer
from moetrain.errors import ConfigError, Problem
from moetrain.models.common.attention import KeyValueCache
from moetrain.models.common.decoder import Decoder
from moetrain.moe.context import ForwardContext
from moetrain.train.restore import restore


@dataclass(kw_only=True)
class GenerateSettings:
    """What to generate and how to sample."""

    run: str = setting(doc="run folder or checkpoint")
    prompt: str = setting(doc="text to continue")
    max_new_tokens: int = setting(64, doc="tokens to generate at most; the end-of-document token ends earlier", ge=1)
    temperature: float = setting(0.8, doc="divides the logits; 0 takes the likeliest token", ge=0)
    top_k: int | None = setting(40, doc="sample among this many likeliest tokens; null: all", ge=1)
    seed: int = setting(0, doc="seed of the sampling", ge=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto takes a GPU if there is one")


def main(settings: GenerateSettings) -> dict[str, Any]:
    """The prompt and its continuation, and the number of new tokens."""
    restored = restore(settings.run, device=settings.device)
    tokenizer = load_tokenizer(restored.run_dir)
    ids = tokenizer.encode(settings.prompt)
    if not ids:
        raise ConfigError([Problem("prompt", settings.prompt, "must hold at least one token")])
    prompt = torch.tensor(ids, device=restored.placed.device)
    new = generate(
        restored.placed.model,
        prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        eos_id=tokenizer.eos_id,
        seed=settings.seed,
    )
    return {"prompt": settings.prompt, "text": tokenizer.decode(new), "tokens": len(new), "checkpoint": str(restored.checkpoint)}


@torch.no_grad()
def generate(
    model: Decoder, prompt: Tensor, *, max_new_tokens: int, temperature: float, top_k: int | None, eos_id: int, seed: int
) -> list[int]:
    """New token ids after ``prompt`` [S] int64, one forward pass for the prompt and one for each new token."""
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    cache, tokens = KeyValueCache(), prompt[None]
    new: list[int] = []
    while len(new) < max_new_tokens:
        ctx = ForwardContext(batch_size=1, seq_len=tokens.shape[1], token_id=tokens[0])
        logits = model(tokens, ctx, cache=cache)[0, -1]
        token = pick(logits, temperature=temperature, top_k=top_k, generator=generator)
        if token == eos_id:
            break
        new.append(token)
        tokens = torch.tensor([[token]], device=prompt.device)
    return new


def pick(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator))
