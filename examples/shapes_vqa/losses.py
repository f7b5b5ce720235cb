"""Auxiliary losses on the vision side: what each token shows, what [CLS] knows, and how long tokens are."""

import numpy as np
import torch
from lessons import Labels
from numpy.typing import NDArray
from processing import Vocabulary
from torch import nn
from torch.nn.functional import cross_entropy

NORM_TARGET = 2.0  # a token that holds four unit words (colour, shape, row, column) at right angles
DENSE_SCALE = 6.0  # logit of a word that a token holds once; fixed, so that lengths cannot grow to sharpen it
BACKGROUND_WEIGHT = 0.1  # there are ten times as many background patches


class SceneHead(nn.Module):
    """Predicts the contents of a picture's cells from one [CLS] vector."""

    def __init__(self, width: int, cells: int, classes: tuple[int, ...]) -> None:
        """Build the head for [CLS] vectors [B, width]; `classes` counts the classes of each attribute."""
        super().__init__()
        self.cells, self.classes = cells, classes
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, cells * sum(classes))

    def forward(self, cls: torch.Tensor, truths: tuple[NDArray[np.int64], ...]) -> torch.Tensor:
        """Mean cross-entropy over cells and attributes; cls [B, width], truths [B, cells] for each attribute."""
        parts = self.linear(self.norm(cls)).float().unflatten(1, (self.cells, -1)).split(self.classes, dim=2)
        losses = [
            cross_entropy(part.flatten(0, 1), torch.from_numpy(truth).flatten())
            for part, truth in zip(parts, truths, strict=True)
        ]
        return torch.stack(losses).mean()


def dense_loss(
    tokens: torch.Tensor, words: torch.Tensor, labels: Labels, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score projected tokens against the decoder's own words for what their patches show.

    Args:
        tokens: [B, 256, D], projected tokens.
        words: [VOCAB_SIZE, D], the decoder's embedding table; no gradient flows into it.
        labels: what the patches show.
        vocabulary: ids of the labels' words.

    Returns:
        The loss, and the share of foreground patches whose shape is right, of those whose shape is known.
    """
    logits = DENSE_SCALE * tokens.float() @ words.detach().float().T
    shown = torch.from_numpy(labels.foreground)
    weight = torch.where(shown, 1.0, BACKGROUND_WEIGHT)
    weight = weight / weight.sum()
    total = logits.new_zeros(())
    for attribute in labels.attributes:
        truth = torch.from_numpy(attribute.truth)
        used = (truth >= 0) & (truth < len(attribute.words))
        scores = logits[used][:, [vocabulary.ids[word] for word in attribute.words]]
        share = weight[used] / weight[used].sum()
        total = total + attribute.importance * (share * cross_entropy(scores, truth[used], reduction="none")).sum()
    shape = torch.from_numpy(labels.shape.truth)
    known = shown & (shape >= 0)
    named = logits[known][:, [vocabulary.ids[word] for word in labels.shape.words]].argmax(1)
    return total / len(labels.attributes), (named == shape[known]).float().mean()


def norm_loss(tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared relative deviation of the tokens' lengths from `NORM_TARGET`; tokens [B, 256, D].

    Without it nothing fixes a token's length (an RMSNorm follows), lengths drift apart between foreground and
    background, and every score that reads lengths then ranks an artefact.
    """
    lengths: torch.Tensor = torch.linalg.vector_norm(tokens.float(), dim=2)
    return (lengths / NORM_TARGET - 1).square().mean()
