"""One contestant of cpu_latency.py in a process of its own: llama.cpp, through llama-cpp-python.

Runs in the environment of llama-cpp-python: it imports that, NumPy and latency_probe, nothing else of the project.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from latency_probe import measure, resident


class LlamaCpp:
    """A GGUF model and a context for one sequence; the prompt is one batch of token ids.

    Args:
        model: The GGUF file.
        prompt: Tokens of the prompt.
        answer: Most tokens after it.
        threads: Threads of prompt and token processing.
    """

    def __init__(self, model: str, prompt: int, answer: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not open {model}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = prompt + answer
        options.n_batch = options.n_ubatch = max(prompt, 512)
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {options.n_ctx} tokens")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        ids = np.random.default_rng(0).integers(3, self._vocab, prompt)
        self._prompt = (llama_cpp.llama_token * prompt)(*ids.tolist())

    def first_token(self) -> tuple[int, dict[str, float]]:
        """See `latency_probe.Contestant`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        token = self._decode(self._prompt)
        return token, {"prefill": time.perf_counter()}

    def next_token(self, token: int) -> int:
        """See `latency_probe.Contestant`."""
        return self._decode((llama_cpp.llama_token * 1)(token))

    def _decode(self, tokens: Any) -> int:
        """Runs tokens, with logits for the last alone, and returns the most likely token after it."""
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        address = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(address, shape=(self._vocab,)).argmax())

    def details(self) -> dict[str, Any]:
        """Returns what llama.cpp says of the model and of itself."""
        text = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, text, len(text))
        return {
            "model": text.value.decode(),
            "model_bytes": llama_cpp.llama_model_size(self._model),
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        }


def main(task: dict[str, Any]) -> None:
    """Loads and measures; prints one JSON object."""
    started = time.perf_counter()
    contestant = LlamaCpp(task["model"], task["prompt"], task["tokens"] + 1, task["threads"])
    load = time.perf_counter() - started
    loaded = resident()
    timings = measure(contestant, task["repeats"], task["seconds"], task["tokens"])
    details = {"prompt_tokens": task["prompt"], **contestant.details()}
    print(json.dumps({"load_s": load, "timings": timings, "resident_after_load": loaded, "details": details}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
