"""Relevance of patches to a question by CLIP, as CDPruner computes it (arXiv 2506.10967)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize


class QuestionRelevance(nn.Module):
    """Compares the vision tower's patches with a question: `qavp_export.numerics.semantic.text_relevance`.

    Patches go through CLIP's `post_layernorm` and `visual_projection`, the question through its text tower, whose state
    of the token that ends the text is pooled, and through `text_projection`. As in CDPruner's code, the patches are the
    hidden states that the projector reads (LLaVA: the last layer but one), not the tower's last layer.
    """

    def __init__(self, clip: Any) -> None:
        """Takes the parts of a `CLIPModel`."""
        super().__init__()
        self.post_layernorm = clip.vision_model.post_layernorm
        self.visual_projection = clip.visual_projection
        self.text_model = clip.text_model
        self.text_projection = clip.text_projection

    def forward(self, patches: Tensor, text_input_ids: Tensor) -> Tensor:
        """Returns relevance `[B,N]` of patches `[B,N,C]` to the questions `[B,L]` of their images."""
        image_embeds = self.visual_projection(self.post_layernorm(patches))
        pooled = self.text_model(input_ids=text_input_ids).pooler_output
        text_embeds = self.text_projection(pooled)
        cosines = (normalize(image_embeds, dim=-1) * normalize(text_embeds, dim=-1).unsqueeze(1)).sum(-1)
        relevance: Tensor = -cosines
        return relevance
