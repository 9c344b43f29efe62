"""Text from a decoder, token by token on its state."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.core.checks import check_integer, check_number, reject
from regard.models.decoder.model import Decoder

OP = "generate"


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Int[Tensor, "b t"],
    length: int,
    *,
    key_mask: Bool[Tensor, "b t"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b n"]:
    """The next tokens of every row, [B, length] or fewer.

        token ~ softmax(logits / temperature) over the `top_k` largest; the largest at 0

    Args:
        tokens: the prompts [B, T]; `key_mask` says which are real where they are not of one
            length, padded on either side.
        length: tokens to make, at most.
        temperature: 0 takes the most probable token.
        stop: a row ends with this id and is filled up with it; when all have ended, so does the
            call.
        generator: where chance comes from.

    The model is in evaluation mode meanwhile.
    Raises: TypeError, ValueError: a bad argument, an empty prompt, a mixer without a state.

    >>> import regard
    >>> model = regard.create_model("mesanet", dim=16, heads=2, head_dim=8, layers=1, vocabulary=9)
    >>> generate(model, torch.tensor([[1, 2, 3]]), 4).shape
    torch.Size([1, 4])
    """
    check_integer(OP, "length", length, least=0)
    check_number(OP, "temperature", temperature, least=0.0)
    if top_k is not None:
        check_integer(OP, "top_k", top_k)
        if temperature == 0:
            raise reject(OP, "top_k", "None at temperature 0, which takes the first", top_k)
    if stop is not None:
        check_integer(OP, "stop", stop, least=0)
    was_training = model.training
    model.eval()
    try:
        return _generate(model, tokens, length, key_mask, temperature, top_k, stop, generator)
    finally:
        model.train(was_training)


def _generate(
    model: Decoder,
    tokens: Tensor,
    length: int,
    key_mask: Tensor | None,
    temperature: float,
    top_k: int | None,
    stop: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    x, state = model.features(tokens, key_mask=key_mask, return_state=True)
    B, T = tokens.shape
    if T == 0 or (key_mask is not None and not bool(key_mask.any(1).all())):
        raise reject(OP, "tokens", "at least one real token in every row", tokens)
    last = torch.full((B,), T - 1, device=tokens.device)
    if key_mask is not None:
        last = T - 1 - key_mask.flip(1).long().argmax(1)
    x = x[torch.arange(B, device=tokens.device), last][:, None]
    made, ended = tokens.new_zeros(B, 0), torch.zeros(B, dtype=torch.bool, device=tokens.device)
    while made.shape[1] < length:
        token = _choose(model.logits(x)[:, 0], temperature, top_k, generator).to(tokens.dtype)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended = ended | (token == stop)
        made = torch.cat([made, token[:, None]], 1)
        if made.shape[1] == length or (stop is not None and bool(ended.all())):
            break
        x, state = model.features(token[:, None], state=state, return_state=True)
    return made


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
