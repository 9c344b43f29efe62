"""Forced decoding of an encoder-decoder model with parts of its input or its memory hidden."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.core.checks import check_choice, check_number, reject
from regard.lens.occlusion import Saliency, Scorer, occlusion_saliency


class ForcedDecoding:
    """The distributions of given tokens, whatever is hidden from the model.

    model: an encoder-decoder of transformers. inputs: its main input, [1, ...]: a spectrogram, a
    waveform, or token ids, which are embedded first. tokens: [1, I], the decoder's input ids.

    fill: what an occluded value becomes. 0 is the usual choice; it is silence only if features are
    normalised to mean 0, and "minimum" is the quietest value of the input instead.
    encoder_calls counts how often the encoder has run.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        tokens: Int[Tensor, "1 I"],
        *,
        fill: float | str = 0.0,
    ) -> None:
        operation = "ForcedDecoding"
        if not hasattr(model, "get_encoder"):
            raise reject(operation, "model", "an encoder-decoder of transformers", type(model))
        if inputs.shape[:1] != (1,) or tokens.shape[:1] != (1,) or tokens.dim() != 2:
            raise reject(operation, "inputs and tokens", "one sequence each", inputs)
        if isinstance(fill, str):
            check_choice(operation, "fill", fill, ("minimum",))
        else:
            check_number(operation, "fill", fill)
        self.model: Any = model
        self.tokens = tokens
        name = getattr(model, "main_input_name", "input_ids")
        if name == "input_ids":
            name = "inputs_embeds"
            encoder = self.model.get_encoder()
            embed = encoder.get_input_embeddings()
            # Marian and Pegasus scale ids' embeddings, but not those they are given.
            scale = 1.0 if hasattr(embed, "embed_scale") else getattr(encoder, "embed_scale", None)
            with torch.no_grad():
                inputs = embed(inputs) * (1.0 if scale is None else scale)
        self.name, self.inputs = name, inputs
        self._output: Any = None  # of the encoder, for what else its decoder may want
        self.fill = float(inputs.min()) if fill == "minimum" else float(fill)
        self.encoder_calls = 0

    def encode(self, inputs: Tensor) -> Tensor:
        """The encoder's output [B, S, E]."""
        self.encoder_calls += 1
        self._output = self.model.get_encoder()(**{self.name: inputs})
        return self._output.last_hidden_state

    def decode(self, memory: Float[Tensor, "B S E"]) -> Float[Tensor, "B I V"]:
        """Log-probabilities of the vocabulary after every position of `tokens`."""
        from transformers.modeling_outputs import BaseModelOutput

        made: Any = BaseModelOutput if self._output is None else type(self._output)
        beside = {
            key: value[:1].expand(len(memory), *value.shape[1:])
            for key, value in (self._output or {}).items()
            if isinstance(value, Tensor) and key != "last_hidden_state"
        }
        encoded = made(last_hidden_state=memory, **beside)
        tokens = self.tokens.expand(len(memory), -1)
        found = self.model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=False)
        return torch.log_softmax(found.logits.float(), dim=-1)

    def hide_input(self, masks: Tensor) -> Float[Tensor, "B I V"]:
        """With the input hidden where masks [B, ...] are 0; [B, T] hides whole vectors or frames.

        Frames of a spectrogram [F, T] are its last axis (the first one, [T, F], if only that has
        as many), vectors of embeddings [T, E] the first.
        """
        shape = tuple(self.inputs.shape[1:])
        kept = masks.to(self.inputs)
        if kept.dim() == 2 and len(shape) == 2:
            last = self.name != "inputs_embeds" and kept.shape[1] == shape[1]
            kept = kept[:, None, :] if last else kept[:, :, None]
        if kept.dim() != 1 + len(shape) or any(
            a not in (1, b) for a, b in zip(kept.shape[1:], shape, strict=True)
        ):
            raise reject("hide_input", "masks", f"[B, {', '.join(map(str, shape))}]", masks)
        return self.decode(self.encode(self.fill + (self.inputs - self.fill) * kept))

    def hide_memory(
        self, masks: Float[Tensor, "B S"], memory: Float[Tensor, "1 S E"]
    ) -> Float[Tensor, "B I V"]:
        """With vectors of the encoder's output zeroed where masks are 0."""
        if masks.shape[1:] != memory.shape[1:2]:
            raise reject("hide_memory", "masks", f"[B, {memory.shape[1]}]", masks)
        return self.decode(memory * masks.to(memory)[..., None])


def input_saliency(
    model: nn.Module,
    inputs: Tensor,
    tokens: Int[Tensor, "1 I"],
    masks: Tensor,
    *,
    scorer: Scorer = "kl",
    fill: float | str = 0.0,
    batch_size: int = 16,
) -> Saliency:
    """The saliency of an encoder-decoder's input, from M runs of encoder and decoder.

    masks: [M, F, T] for a spectrogram, or [M, T] for the vectors of a sequence. tokens: the
    decoder's input ids, with the start token; the predicted tokens are the following ones, and
    what follows the last is the model's likeliest. Use the model's own hypothesis.
    """
    forced = ForcedDecoding(model, inputs, tokens, fill=fill)
    with torch.inference_mode():
        clean = forced.decode(forced.encode(forced.inputs))[0]
    said = _following(tokens, clean)
    return occlusion_saliency(
        forced.hide_input, masks, clean=clean, scorer=scorer, tokens=said, batch_size=batch_size
    )


def encoder_output_saliency(
    model: nn.Module,
    inputs: Tensor,
    tokens: Int[Tensor, "1 I"],
    masks: Float[Tensor, "M S"],
    *,
    scorer: Scorer = "kl",
    batch_size: int = 16,
) -> Saliency:
    """The saliency of the encoder's output vectors: what the decoder reads, without the mixing
    of contexts that the encoder did. The encoder runs once, the decoder M times.
    """
    forced = ForcedDecoding(model, inputs, tokens)
    with torch.inference_mode():
        memory = forced.encode(forced.inputs)
        clean = forced.decode(memory)[0]
    return occlusion_saliency(
        lambda hidden: forced.hide_memory(hidden, memory),
        masks,
        clean=clean,
        scorer=scorer,
        tokens=_following(tokens, clean),
        batch_size=batch_size,
    )


def _following(tokens: Tensor, clean: Tensor) -> Tensor:
    return torch.cat([tokens[0, 1:].to(clean.device), clean[-1:].argmax(-1)])
