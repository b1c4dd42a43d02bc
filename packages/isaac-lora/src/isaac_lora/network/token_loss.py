"""Cross entropy of the next token, at the places that have a label and nowhere else.

The logits of 16384 tokens over 151936 words are 10 GB in float32, and most places, images and
prompts, have no label. So the head is applied to labelled places only, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isaac_lora.network.positions import document_begins
from lora_core.errors import DataError

IGNORED = -100  # the label that counts nowhere, as everywhere in torch and transformers
LOGIT_BYTES = 256 * 2**20  # float32 logits that are in memory at a time


def token_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Give sum(-log p(labels[j + 1] | places up to j)) / n, a float32 scalar.

    n is `num_items_in_batch`, the labels of the whole accumulated batch, or else the number of
    labels here. Without any label the loss is zero and so are its gradients.

    Args:
        hidden_states: (B, L, C), after the last norm.
        labels: (B, L) int64, -100 where there is no label.
        lm_head: maps (n, C) to (n, vocab_size).
        vocab_size: decides how many places go through the head at a time.
        num_items_in_batch: the divisor, where micro-batches and processes share it.
        document_ids: (B, L); the first token of a document is not predicted from another one.
        attention_mask: (B, L), zero at padding, from which nothing is predicted either.

    Raises:
        DataError: labels of another shape than the tokens.
    """
    if labels.shape != hidden_states.shape[:2]:
        raise DataError(
            f"labels have the shape {tuple(labels.shape)}, but the tokens "
            f"{tuple(hidden_states.shape[:2])}; give one label for every token, -100 for none"
        )
    labelled = predicted_places(labels, document_ids, attention_mask)
    states = hidden_states[:, :-1][labelled]
    targets = labels[:, 1:][labelled]
    total = _summed(states, targets, lm_head, max(1, LOGIT_BYTES // (4 * vocab_size)))
    divisor = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
    return total / divisor


def predicted_places(
    labels: Tensor, document_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Mark the places j of the same sample whose next token has a label, (B, L - 1) bool."""
    labelled = labels[:, 1:] != IGNORED
    if document_ids is not None:
        labelled = labelled & ~document_begins(document_ids)[:, 1:]
    if attention_mask is not None and attention_mask.ndim == 2:
        labelled = labelled & attention_mask[:, :-1].bool()  # padding may stand on the left
    return labelled


def _summed(
    states: Tensor, targets: Tensor, lm_head: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Sum over parts of at most `rows` places; their logits are made again for the gradient."""
    if len(states) <= rows:
        return _cross_entropy(states, targets, lm_head)
    parts = zip(states.split(rows), targets.split(rows), strict=True)
    sums = [
        checkpoint(_cross_entropy, state, target, lm_head, use_reentrant=False)
        for state, target in parts
    ]
    return torch.stack(sums).sum()


def _cross_entropy(states: Tensor, targets: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")
