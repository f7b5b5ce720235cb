"""Pixtral's processor where there is no torch: transformers' own class imports torchvision for its image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """`transformers.PixtralProcessor` on any image processor: same settings, same text for an image."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        """Keeps the settings of `processor_config.json`."""
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def _process_images(self, images: Any, **options: Any) -> Any:
        options["patch_size"] = self.patch_size * self.spatial_merge_size
        return super()._process_images(images, **options)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:
        """Returns an image's tokens, row by row: each row ends with a break, the last with the image's end."""
        cell = self.patch_size * self.spatial_merge_size
        height, width = image_inputs["image_sizes"][image_idx]
        rows = [self.image_token * (width // cell)] * (height // cell)
        return self.image_break_token.join(rows) + self.image_end_token
