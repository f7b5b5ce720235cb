"""Runs a family's traced graphs with ONNX Runtime, and Hugging Face transformers on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from qavp_export import pipeline
from qavp_export.checkpoint import Checkpoint
from qavp_export.families import Family, Plan, family_for
from qavp_export.passes import PruneVisionTokens
from qavp_export.passes.relevance import drop_relevance
from qavp_export.runtime.processors import load_processor
from qavp_export.tracing import build_skeleton
from qavp_export.weights import CheckpointWeights

Array = npt.NDArray[Any]

# Of the largest logit: float32 sums in another order. 4e-6 was seen; a key too many or too few makes 1e-3 and more.
ROUNDING = 5e-5


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint: the graphs that were traced of it, and the model itself."""

    family: Family
    plan: Plan
    processor: Any
    graphs: Mapping[str, ir.Model]
    reference: Any

    @classmethod
    def of(cls, folder: Path) -> Case:
        """Traces a checkpoint and loads it with transformers."""
        config = AutoConfig.from_pretrained(folder)
        family = family_for(config.model_type)
        plan = family.plan(config)
        skeleton, mode = build_skeleton(config)
        weights = CheckpointWeights(Checkpoint.open(folder), family, skeleton)
        graphs = pipeline.trace_components(family, plan, skeleton, mode, weights.tensor, lambda *_: None)
        reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(family, plan, load_processor(folder), graphs, reference)

    def unpruned(self) -> Runner:
        """Returns what runs the graphs with all vision tokens."""
        vision = self.graphs["vision_encoder"].clone()
        drop_relevance(vision)
        return self._runner(vision)

    def pruned(self, tokens: int, semantic: Any) -> Runner:
        """Returns what runs the graphs with the best `tokens` of each unit."""
        vision = self.graphs["vision_encoder"].clone()
        PruneVisionTokens(tokens=tokens, semantic=semantic)(vision)
        return self._runner(vision)

    def _runner(self, vision: ir.Model) -> Runner:
        graphs = {**self.graphs, "vision_encoder": vision}
        sessions = {name: open_graph(graph) for name, graph in graphs.items()}
        return Runner(sessions, self.plan, (self.plan.image_token_id, *_list(_eos(self.reference))))


def open_graph(graph: ir.Model) -> ort.InferenceSession:
    """Opens a graph on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, ["CPUExecutionProvider"])


def _eos(model: Any) -> int | list[int]:
    found: int | list[int] = model.generation_config.eos_token_id
    return found


def _list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Batch:
    """Two prompts, the second shorter and padded on the left, as the checkpoint's processor makes them.

    Attributes:
        inputs: What transformers' `generate` takes.
        tiles: `[T,3,H,W]`, every tile of every image, in the order of their placeholders.
    """

    inputs: dict[str, torch.Tensor]
    tiles: Array

    @classmethod
    def of(cls, processor: Any, texts: list[str], images: list[list[Image.Image]]) -> Batch:
        """Runs the processor."""
        inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
        # PaliGemma's are for training.
        inputs.pop("labels", None)
        pixels = inputs["pixel_values"].numpy()
        if pixels.ndim == 5:
            # Idefics3 gives prompts with fewer tiles than the longest empty ones.
            pixels = pixels.reshape(-1, *pixels.shape[2:])
            pixels = pixels[np.abs(pixels).sum((1, 2, 3)) > 0]
        return cls(inputs, pixels)

    @property
    def ids(self) -> Array:
        """Token ids `[B,S]`."""
        ids: Array = self.inputs["input_ids"].numpy()
        return ids

    @property
    def mask(self) -> Array:
        """1 for tokens and 0 for padding `[B,S]`."""
        mask: Array = self.inputs["attention_mask"].numpy()
        return mask

    def stays(self, image_token: int, kept: Array, tokens: int) -> Array:
        """Which tokens `[B,S]` stay: text, and placeholder i of a unit of `tokens` if `kept [T,k]` has i."""
        stays = self.ids != image_token
        units = np.zeros((len(kept), tokens), np.bool_)
        np.put_along_axis(units, kept, True, axis=1)
        stays[self.ids == image_token] = units.reshape(-1)
        return stays


@dataclass(frozen=True)
class Answer:
    """Greedy tokens `[B,steps]` and the logits that they were chosen by `[B,steps,V]`."""

    tokens: Array
    logits: Array

    def check(self, expected: Answer) -> None:
        """Fails if tokens differ, or logits by more than float32 sums in another order make of them."""
        np.testing.assert_array_equal(self.tokens, expected.tokens)
        np.testing.assert_allclose(self.logits, expected.logits, rtol=0, atol=ROUNDING * np.abs(expected.logits).max())


def _grown(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the cache that a step leaves to the next."""
    present = {name: array for name, array in outputs.items() if name.startswith("present.")}
    return {name.replace("present.", "past_key_values."): array for name, array in present.items()}


@dataclass(frozen=True)
class Runner:
    """The three graphs, opened.

    Attributes:
        sessions: By component.
        plan: The model's sizes.
        never: Tokens that are not generated: the placeholder and the end.
    """

    sessions: Mapping[str, ort.InferenceSession]
    plan: Plan
    never: tuple[int, ...]

    def encode(self, tiles: Array) -> dict[str, Array]:
        """Returns the vision encoder's outputs by name."""
        return self._run("vision_encoder", {"pixel_values": tiles.astype(np.float32)})

    def generate(self, ids: Array, mask: Array, features: Array, steps: int) -> Answer:
        """Answers left-padded prompts `[B,S]` with image features `[I,k,D]`."""

        def embed(tokens: Array, shown: Array = features[:0]) -> Array:
            return self._run("embedding", {"input_ids": tokens, "image_features": shown})["inputs_embeds"]

        return self.decode(embed(ids, features), mask, embed, steps, self._types(ids))

    def replay(self, ids: Array, mask: Array, features: Array, tokens: Array) -> Array:
        """Returns the logits `[B,steps,V]` of `tokens [B,steps]`, all but the last given in one step on the cache."""
        embeds = self._run("embedding", {"input_ids": ids, "image_features": features})["inputs_embeds"]
        first = self._decoder(embeds, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0), self._types(ids), {})
        given = tokens[:, :-1]
        embeds = self._run("embedding", {"input_ids": given, "image_features": features[:0]})["inputs_embeds"]
        grown = np.concatenate([mask, np.ones_like(given)], axis=1)
        positions = np.cumsum(grown, axis=1)[:, -given.shape[1] :] - 1
        rest = self._decoder(embeds, grown, positions, np.zeros_like(given), _grown(first))
        return np.concatenate([first["logits"][:, -1:], rest["logits"]], axis=1)

    def decode(
        self, embeds: Array, mask: Array, embed: Callable[[Array], Array], steps: int, types: Array | None = None
    ) -> Answer:
        """Answers by a prefill and steps on its cache.

        Args:
            embeds: Left-padded prompts `[B,S,D]`.
            mask: `[B,S]`.
            embed: Embeds tokens `[B,1]`.
            steps: Tokens to generate.
            types: 1 for image tokens `[B,S]`, for decoders that take them.
        """
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        cache: dict[str, Array] = {}
        answer: list[Array] = []
        all_logits: list[Array] = []
        for _ in range(steps):
            outputs = self._decoder(embeds, mask, positions, types, cache)
            cache = _grown(outputs)
            logits = outputs["logits"][:, -1]
            all_logits.append(logits.copy())
            logits[:, list(self.never)] = -np.inf
            answer.append(logits.argmax(-1)[:, None])
            embeds, types = embed(answer[-1]), np.zeros_like(answer[-1])
            mask = np.concatenate([mask, np.ones_like(answer[-1])], axis=1)
            positions = positions[:, -1:] + 1
        return Answer(np.concatenate(answer, axis=1), np.stack(all_logits, axis=1))

    def _types(self, ids: Array) -> Array:
        types: Array = (ids == self.plan.image_token_id).astype(np.int64)
        return types

    def _decoder(
        self, embeds: Array, mask: Array, positions: Array, types: Array | None, cache: Mapping[str, Array]
    ) -> dict[str, Array]:
        names = [value.name for value in self.sessions["decoder"].get_inputs()]
        empty = np.zeros((len(mask), self.plan.num_key_value_heads, 0, self.plan.head_dim), np.float32)
        past = {name: cache.get(name, empty) for name in names if name.startswith("past_key_values.")}
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past}
        if "token_type_ids" in names and types is not None:
            given["token_type_ids"] = types
        return self._run("decoder", given)

    def _run(self, component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        session = self.sessions[component]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def transformers_answer(model: Any, steps: int, image_token: int, **inputs: torch.Tensor) -> Answer:
    """Answers by transformers' `generate`, which takes neither the end nor `image_token`."""
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            suppress_tokens=[image_token],
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Answer(output.sequences[:, -steps:].numpy(), torch.stack(output.logits, dim=1).numpy())


def transformers_answer_to(case: Case, steps: int, embeds: Array, mask: Array, **prefill: torch.Tensor) -> Answer:
    """Answers by transformers' forward: not every family's `generate` takes embeddings.

    Args:
        case: The model.
        steps: Tokens to generate.
        embeds: `[B,S,D]`, padded on the left.
        mask: `[B,S]`.
        prefill: What the prefill takes beyond them.
    """
    never = [case.plan.image_token_id, *_list(_eos(case.reference))]
    given: dict[str, Any] = {"inputs_embeds": torch.from_numpy(embeds), **prefill}
    answer: list[torch.Tensor] = []
    all_logits: list[torch.Tensor] = []
    attention = torch.from_numpy(mask)
    for _ in range(steps):
        # Positions only ever count as differences.
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -(1 if answer else attention.shape[1]) :]
        with torch.no_grad():
            output = case.reference(**given, attention_mask=attention, position_ids=positions, use_cache=True)
        logits = output.logits[:, -1]
        all_logits.append(logits.clone())
        logits[:, never] = -torch.inf
        answer.append(logits.argmax(-1, keepdim=True))
        attention = torch.cat([attention, torch.ones_like(answer[-1])], dim=1)
        given = {"input_ids": answer[-1], "past_key_values": output.past_key_values}
    return Answer(torch.cat(answer, dim=1).numpy(), torch.stack(all_logits, dim=1).numpy())


def traced_vision(folder: Path, family: Family) -> tuple[Any, ir.Model]:
    """Returns a checkpoint as transformers loads it, with eager attention, and its vision graph with those weights."""
    config = AutoConfig.from_pretrained(folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    parameters = dict(reference.named_parameters())

    def weight(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        assert tuple(parameters[name].shape) == shape
        return ir.tensor(parameters[name].detach().numpy())

    skeleton, mode = build_skeleton(config)
    graphs = pipeline.trace_components(family, family.plan(config), skeleton, mode, weight, lambda *_: None)
    return reference.eval(), graphs["vision_encoder"]
