"""Auxiliary losses on the vision side: what each token shows, what [CLS] knows, and how long tokens are."""

import torch
from processing import BACKGROUND, vocabulary
from rendering import NO_COLOR, NO_DIGIT, NO_SHAPE, PatchLabels
from scenes import CELLS, COLORS, COLUMNS, DIGITS, ROWS, SHAPES
from torch import nn
from torch.nn.functional import cross_entropy

NORM_TARGET = 2.0  # a token that holds four unit words (colour, shape, row, column) at right angles
DENSE_SCALE = 6.0  # logit of a word that a token holds once; fixed, so that lengths cannot grow to sharpen it
BACKGROUND_WEIGHT = 0.1  # there are ten times as many background patches
SHAPE_WEIGHT = 3.0  # by far the hardest attribute: colours and places are right after 100 steps
SHAPE_WORDS = (*SHAPES, "digit", BACKGROUND)  # in the order of the labels


def word_ids(words: tuple[str, ...]) -> torch.Tensor:
    """Ids of words, [n]."""
    ids = vocabulary()
    return torch.tensor([ids[word] for word in words])


class SceneHead(nn.Module):
    """Predicts the contents of the nine cells from one [CLS] vector."""

    def __init__(self, width: int) -> None:
        """Build the head for [CLS] vectors [B, width]."""
        super().__init__()
        self.sizes = (NO_COLOR + 1, NO_SHAPE + 1, NO_DIGIT + 1)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, CELLS * sum(self.sizes))

    def forward(self, cls: torch.Tensor, labels: PatchLabels) -> torch.Tensor:
        """Mean cross-entropy over cells and attributes; cls [B, width]."""
        parts = self.linear(self.norm(cls)).float().unflatten(1, (CELLS, -1)).split(self.sizes, dim=2)
        truths = (labels.cell_color, labels.cell_shape, labels.cell_digit)
        losses = [
            cross_entropy(part.flatten(0, 1), torch.from_numpy(truth).flatten())
            for part, truth in zip(parts, truths, strict=True)
        ]
        return torch.stack(losses).mean()


def dense_loss(tokens: torch.Tensor, words: torch.Tensor, labels: PatchLabels) -> tuple[torch.Tensor, torch.Tensor]:
    """Score projected tokens against the decoder's own words for what their patches show.

    Args:
        tokens: [B, 256, D], projected tokens.
        words: [VOCAB_SIZE, D], the decoder's embedding table; no gradient flows into it.
        labels: what the patches show.

    Returns:
        The loss, and the share of foreground patches whose shape is right.
    """
    logits = DENSE_SCALE * tokens.float() @ words.detach().float().T
    shape = torch.from_numpy(labels.shape)
    color, digit = torch.from_numpy(labels.color), torch.from_numpy(labels.digit)
    cell = torch.from_numpy(labels.cell)
    weight = torch.where(shape == NO_SHAPE, BACKGROUND_WEIGHT, 1.0)
    weight = weight / weight.sum()
    tasks = (
        (COLORS, color, color != NO_COLOR, 1.0),
        (SHAPE_WORDS, shape, shape >= 0, SHAPE_WEIGHT),
        (DIGITS, digit, digit != NO_DIGIT, 1.0),
        (ROWS, cell // 3, shape >= 0, 1.0),
        (COLUMNS, cell % 3, shape >= 0, 1.0),
    )
    total = logits.new_zeros(())
    for names, truth, used, importance in tasks:
        scores, wanted = logits[used][:, word_ids(names)], truth[used]
        share = weight[used] / weight[used].sum()
        total = total + importance * (share * cross_entropy(scores, wanted, reduction="none")).sum()
    shown = shape != NO_SHAPE
    named = logits[shown][:, word_ids(SHAPE_WORDS)].argmax(1)
    return total / len(tasks), (named == shape[shown]).float().mean()


def norm_loss(tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared relative deviation of the tokens' lengths from `NORM_TARGET`; tokens [B, 256, D].

    Without it nothing fixes a token's length (an RMSNorm follows), lengths drift apart between foreground and
    background, and every score that reads lengths then ranks an artefact.
    """
    lengths: torch.Tensor = torch.linalg.vector_norm(tokens.float(), dim=2)
    return (lengths / NORM_TARGET - 1).square().mean()
