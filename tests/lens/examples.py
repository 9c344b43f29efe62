"""Models of transformers small enough for tests, built from configs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from golden_files import parts, settings

WHISPER = "cross_attention_explanation/tiny_whisper"


@lru_cache(maxsize=1)
def tiny_whisper() -> tuple[Any, tuple[Tensor, Tensor]]:
    """The Whisper of the golden files, and its spectrogram [1, 8, 40] and tokens [1, 5]."""
    import transformers

    config = settings(WHISPER)
    config.pop("transformers_version")
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config))
    golden = parts(WHISPER)
    model.load_state_dict(golden["state"])
    return model.eval(), (golden["in"]["input_features"], golden["in"]["decoder_input_ids"])


def tiny_bert(**options: Any) -> Any:
    """A BERT of three layers and two heads, seeded."""
    import transformers

    torch.manual_seed(0)
    given = {
        "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 16, "initializer_range": 0.4, **options,
    }  # fmt: skip
    return transformers.BertModel(transformers.BertConfig(**given)).eval()


def padded_batch() -> dict[str, Tensor]:
    """Two inputs of 7 and 4 tokens, padded to the right."""
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}
