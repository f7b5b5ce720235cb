"""What families have in common whose tiles all have one size, each a unit of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from qavp_export.families.base import CachedDecoder, Family, MergeEmbedding


class GridFamily(Family):
    """A family of layout `grid` whose text model has an embedding table `embed_tokens`, and the model an `lm_head`."""

    def text_model(self, model: Any) -> Any:
        """Returns the decoder without its head."""
        return model.model.language_model

    def embedding(self, model: Any) -> nn.Module:
        """Returns the merging embedding; see `Family.embedding`."""
        return MergeEmbedding(self.text_model(model).embed_tokens, int(model.config.image_token_id))

    def decoder(self, model: Any) -> nn.Module:
        """Returns the language model with its cache unpacked; see `Family.decoder`."""
        return CachedDecoder(self.text_model(model), model.lm_head)
