"""The loss at labelled places only: its value, its gradients, its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isaac_lora.network import token_loss as module
from isaac_lora.network.token_loss import predicted_places, token_loss
from lora_core.errors import DataError

WORDS, WIDTH = 50, 8


def states_and_labels(length: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, length, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, WORDS, (2, length), generator=generator)
    return states, labels.masked_fill(torch.rand(2, length, generator=generator) < 0.5, -100)


def head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WORDS, bias=False)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * WORDS * rows)
    states, labels = states_and_labels()
    one, other = head(), head()
    loss = token_loss(states, labels, one, WORDS)
    loss.backward()
    whole = states.detach().requires_grad_()
    logits = other(whole)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert states.grad is not None
    torch.testing.assert_close(states.grad, whole.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-5, atol=1e-7)


def test_micro_batches_together_weigh_every_label_alike() -> None:
    states, labels = states_and_labels()
    labels[0, 3:] = -100  # a short answer beside a long one
    whole = token_loss(states, labels, head(), WORDS)
    count = int(predicted_places(labels).sum())
    parts = [
        token_loss(states[row : row + 1], labels[row : row + 1], head(), WORDS, count)
        for row in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_without_any_label_loss_and_gradients_are_zero() -> None:
    states, labels = states_and_labels()
    last = head()
    loss = token_loss(states, torch.full_like(labels, -100), last, WORDS)
    assert loss.item() == 0
    loss.backward()
    for gradient in (states.grad, last.weight.grad):
        assert gradient is not None
        assert not gradient.any()


def test_nothing_is_predicted_from_another_sample_or_from_padding() -> None:
    labels = torch.zeros(1, 6, dtype=torch.long)
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert predicted_places(labels, documents)[0].tolist() == [True, False, True, True, False]
    real = torch.tensor([[0, 0, 1, 1, 1, 1]])
    left = predicted_places(labels, attention_mask=real)
    assert left[0].tolist() == [False, False, True, True, True]


def test_labels_of_another_length_are_refused() -> None:
    states, labels = states_and_labels()
    with pytest.raises(DataError, match=r"\(2, 39\), but the tokens \(2, 40\)"):
        token_loss(states, labels[:, 1:], head(), WORDS)


def test_logits_are_made_for_labelled_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * WORDS * 16)
    seen: list[int] = []

    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(len(input))
            return super().forward(input)

    for length in (100, 5000):
        states, labels = states_and_labels(length)
        labels[:, :-30] = -100  # a long prompt, a short answer
        labels[:, -30:] = 1
        with torch.no_grad():
            token_loss(states, labels, Counting(WIDTH, WORDS), WORDS)
    assert seen == [16, 16, 16, 12] * 2


class Saved:
    """Bytes that are kept for the gradient."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor

    def unpack(self, tensor: Tensor) -> Any:
        return tensor


def test_logits_are_not_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * WORDS * 16)
    states, labels = states_and_labels(2000)
    places, saved = int(predicted_places(labels).sum()), Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        token_loss(states, labels, head(), WORDS)
    assert saved.bytes < places * WORDS * 4
