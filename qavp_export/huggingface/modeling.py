"""QavpForImageTextToText: a bundle as a transformers model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from optimum.modeling_base import OptimizedModel  # type: ignore[import-untyped]
from transformers import (
    AutoConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from qavp_export.engines import EngineOptions
from qavp_export.errors import BundleError, InputError, PromptError
from qavp_export.huggingface.cache import EngineCache
from qavp_export.huggingface.hub import HubOptions, find_bundle
from qavp_export.huggingface.inputs import IMAGE_INPUTS, UNREAD_INPUTS, split_batch
from qavp_export.huggingface.processors import ContextFull, NoImageToken
from qavp_export.manifest import MANIFEST_NAME, Manifest
from qavp_export.runtime import Prepared, QavpModel

# transformers' pipelines log an error about a class whose name is not among these.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("qavp", "QavpForImageTextToText")


class QavpForImageTextToText(OptimizedModel, GenerationMixin):  # type: ignore[misc]
    """A bundle behind the interface of a transformers model: `generate`, pipelines, the Hub.

    Takes what the bundle's own `AutoProcessor` returns, with as many image placeholders as the checkpoint itself needs.
    The placeholders of pruned tokens are taken out inside: `generate` returns the given `input_ids`, placeholders and
    padding included, followed by the new tokens, as it does for any transformers model, while the decoder reads the
    shortened prompts. All lengths in a generation configuration refer to the sequences as given.

    Example:
        >>> model = QavpForImageTextToText.from_pretrained("bundle")
        >>> processor = AutoProcessor.from_pretrained("bundle")
        >>> inputs = processor(images=image, text="USER: <image> What is this? ASSISTANT:", return_tensors="pt")
        >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)

    Attributes:
        model: The `QavpModel` that does the work.
        config: The checkpoint's configuration.
        generation_config: What `generate` does by default.
        bundle: The bundle's folder.
    """

    model: QavpModel

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    # The engine's cache cannot be cut back: transformers then refuses assisted generation.
    _is_stateful = True

    def __init__(
        self, model: QavpModel, config: PreTrainedConfig, generation_config: GenerationConfig, bundle: Path
    ) -> None:
        super().__init__(model, config)
        self.generation_config = generation_config
        self.bundle = bundle

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        export: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        token: bool | str | None = None,
        *,
        engine: str = "ort-cpu",
        options: EngineOptions | None = None,
    ) -> QavpForImageTextToText:
        """Loads a bundle from a folder or from the Hub.

        Args:
            model_id: The bundle's folder, or a Hub id (org/name).
            config: A configuration, or where to find one, instead of the bundle's own.
            export: Not supported: see the error.
            subfolder: Folder of the repository that holds the bundle.
            revision: Branch, tag or commit of the Hub repository.
            force_download: Whether to download what is in the cache already.
            local_files_only: Whether to use the cache only, no network.
            trust_remote_code: Not supported: a bundle needs none.
            cache_dir: The Hub cache to use instead of the user's.
            token: Token for private repositories.
            engine: See `QavpModel.from_bundle`.
            options: See `QavpModel.from_bundle`.

        Raises:
            InputError: An argument is wrong.
            BundleError: The folder or repository is not a whole bundle.
            UnavailableError: The engine is not available here, or the bundle cannot be downloaded.
        """
        if export:
            raise InputError(
                f"export=True is not supported; run `optimum-cli export qavp --model {model_id} OUT` and load OUT"
            )
        if trust_remote_code:
            raise InputError("trust_remote_code=True is not supported: a bundle has no code to run; leave it out")
        cache = None if cache_dir is None else Path(cache_dir)
        hub = HubOptions(subfolder, revision, force_download, local_files_only, cache, token)
        bundle = find_bundle(model_id, hub)
        model = QavpModel.from_bundle(bundle, engine, options)
        if not isinstance(config, PreTrainedConfig):
            config = _load_config(bundle if config is None else Path(config))
        return cls(model, config, _generation_config(bundle, config, model), bundle)

    @classmethod
    def can_generate(cls) -> bool:
        """Returns True."""
        return True

    @property
    def device(self) -> torch.device:
        """Where inputs are read and logits are written; the engine computes where it likes."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What inputs are read as and logits are written in."""
        return torch.float32

    def to(self, *_: Any, **__: Any) -> QavpForImageTextToText:
        """Returns the model as it is: the engine that it was loaded with decides where and in what it computes."""
        return self

    def eval(self) -> QavpForImageTextToText:
        """Returns the model as it is: it cannot be trained."""
        return self

    def get_experts_implementation(self) -> dict[str, str]:
        """Returns nothing: transformers asks how mixtures of experts are to run, which the graphs have settled."""
        return {}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EngineCache | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        keep: float | None = None,
        **images: torch.Tensor | None,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, EngineCache]:
        """Runs prompts, or one more token for each sequence of a cache.

        Args:
            input_ids: Prompts `[B, S]` with the placeholders that the processor wrote, or new tokens `[B, 1]`.
            attention_mask: 1 for a token, 0 for padding on either side; read for prompts only.
            past_key_values: What an earlier call returned; None for prompts.
            logits_to_keep: Number of last positions to return logits of; 0 for all.
            return_dict: Whether to return an object instead of a tuple.
            keep: See `generate`; read for prompts only.
            images: What the processor made of the images, by its names.

        Returns:
            Logits `[B, S', V]` float32, where S' is the length of the longest prompt after pruning, padded on the left,
            or 1; and the cache.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            InputError: An input is unknown, or a cache is continued by several tokens at once.
        """
        if unknown := sorted(images.keys() - IMAGE_INPUTS - UNREAD_INPUTS):
            raise InputError(f"{', '.join(unknown)} is not read; pass what the bundle's AutoProcessor returns")
        if past_key_values is None:
            past_key_values = self._start(self._prepare(input_ids, attention_mask, images, keep))
        elif images:
            raise InputError(f"{', '.join(images)} came with past_key_values; pass images with the prompts only")
        if past_key_values.is_filled:
            values = past_key_values.decode(input_ids)
        else:
            values = past_key_values.prefill(input_ids, logits_to_keep)
        logits = torch.from_numpy(values)
        if not return_dict:
            return logits, past_key_values
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        keep: float | None = None,
        **options: Any,
    ) -> Any:
        """Generates as transformers' `generate` does, from what the bundle's processor returned.

        Images are encoded, and prompts run, once, however many beams or returned sequences start with them. As
        `QavpModel` does, it never generates the image token and ends an answer where the context is full.

        Args:
            inputs: The prompts, if they are not passed as `input_ids`.
            input_ids: Prompts `[B, S]`.
            attention_mask: 1 for a token, 0 for padding; None: padding tokens are masked where they end no answer.
            logits_processor: See transformers.
            stopping_criteria: See transformers.
            keep: The share of vision tokens that survives, where the bundle was exported with a range; None for its
                default.
            options: The processor's other outputs, and everything else that transformers' `generate` takes but a
                cache, `inputs_embeds`, and an assistant model.

        Returns:
            `input_ids` followed by new tokens, or transformers' output object, as in transformers.

        Raises:
            PromptError: A prompt does not match its images or does not fit the context.
            InputError: An argument is not supported.
        """
        ids = inputs if input_ids is None else input_ids
        if ids is None:
            raise PromptError("generate() has no input_ids; pass what the bundle's AutoProcessor returns")
        if options.get("past_key_values") is not None:
            raise InputError("past_key_values cannot be continued by generate(); pass the whole conversation instead")
        if attention_mask is None:
            attention_mask = self._mask_padding(ids)
        images = {name: options.pop(name) for name in (IMAGE_INPUTS | UNREAD_INPUTS) & options.keys()}
        prepared = self._prepare(ids, attention_mask, images, keep)
        decoder = self.model.manifest.decoder
        room = decoder.context_length - prepared.next_positions
        banned = NoImageToken(self.model.manifest.vision_tokens.image_token_id)
        return super().generate(
            ids,
            attention_mask=attention_mask,
            past_key_values=self._start(prepared),
            logits_processor=LogitsProcessorList([*(logits_processor or ()), banned]),
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or ()), ContextFull(room, ids.shape[1])]),
            **options,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: EngineCache,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002
        logits_to_keep: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """Returns what `forward` needs of what transformers keeps from step to step; the cache knows the rest.

        transformers takes arguments of `generate` that are not named here for typing errors.
        """
        unseen = input_ids[:, past_key_values.get_seq_length() :]
        return {"input_ids": unseen, "past_key_values": past_key_values, "logits_to_keep": logits_to_keep}

    def push_to_hub(
        self,
        save_directory: str | os.PathLike[str],
        repository_id: str,
        private: bool | None = None,
        token: bool | str | None = None,
    ) -> str:
        """Uploads a saved bundle in one commit, folders and all.

        Args:
            save_directory: What `save_pretrained` wrote.
            repository_id: The Hub repository (org/name); made if there is none.
            private: Whether a new repository is private; None: the organization's default.
            token: The token to use instead of that of `hf auth login`.

        Returns:
            The address of the commit.

        Raises:
            BundleError: The folder is not a bundle.
        """
        Manifest.read(Path(save_directory))
        api = HfApi(token=token)
        api.create_repo(repository_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository_id, folder_path=Path(save_directory), ignore_patterns=[".*"]))

    def _save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Leaves the configuration to `_save_pretrained`: the manifest holds its hash."""

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Copies the bundle as it is, byte for byte."""
        target = Path(save_directory)
        if target.resolve() == self.bundle.resolve():
            return
        for name in (*(entry.path for entry in self.model.manifest.files), MANIFEST_NAME):
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.bundle / name, file)
            except FileNotFoundError as error:
                raise BundleError(f"{self.bundle / name} is missing; export the bundle again") from error

    def _prepare(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: Mapping[str, Any],
        keep: float | None,
    ) -> Prepared:
        """Hands the runtime what its own processor would have returned."""
        encoded = split_batch(input_ids, attention_mask, images, self.model.manifest.vision_tokens)
        return self.model.preparer.prepare_encoded(encoded, keep)

    def _start(self, prepared: Prepared) -> EngineCache:
        return EngineCache(self.model.engine.start(), prepared, self.model.manifest.decoder.context_length)

    def _mask_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The mask of prompts that came without one, as transformers infers it."""
        decoder = self.model.manifest.decoder
        if decoder.pad_token_id in decoder.eos_token_ids:
            return torch.ones_like(input_ids)
        return input_ids.ne(decoder.pad_token_id).long()


def _load_config(place: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"the configuration in {place} cannot be read ({' '.join(str(error).split())})") from error
    return config


def _generation_config(bundle: Path, config: PreTrainedConfig, model: QavpModel) -> GenerationConfig:
    """The checkpoint's own, with the tokens that the bundle ends and pads answers with where it names none."""
    if (bundle / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(bundle, local_files_only=True)
    else:
        generation = GenerationConfig.from_model_config(config)
    decoder = model.manifest.decoder
    if generation.eos_token_id is None:
        generation.eos_token_id = decoder.eos_token_ids
    if generation.pad_token_id is None:
        generation.pad_token_id = decoder.pad_token_id
    return generation
