"""From what the user typed to a checkpoint folder: a local folder, a short name, or a Hugging Face Hub id.

The Hub's cache is used first, without network; only what is missing is downloaded, and never a pickle file.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from qavp_export.errors import CheckpointError, InputError, QavpError, UnavailableError
from qavp_export.safetensors_index import INDEX_FILE, SINGLE_FILE, shown

SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        "bakllava": "llava-hf/bakLlava-v1-hf",
        "llava-interleave-qwen-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
        "llava-interleave-qwen-7b": "llava-hf/llava-interleave-qwen-7b-hf",
        "llava-interleave-qwen-7b-dpo": "llava-hf/llava-interleave-qwen-7b-dpo-hf",
        "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-onevision-qwen2-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-qwen2-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "vip-llava-7b": "llava-hf/vip-llava-7b-hf",
        "vip-llava-13b": "llava-hf/vip-llava-13b-hf",
        "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
        "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        "gemma-3-4b": "google/gemma-3-4b-it",
        "gemma-3-12b": "google/gemma-3-12b-it",
        "paligemma2-3b": "google/paligemma2-3b-mix-224",
        "mistral-small-3.1-24b": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    }
)
"""Short names and their Hub ids: well-known models of the supported families."""

_ALLOW = ("*.safetensors", "*.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "*.model")
_IGNORE = ("*.bin*", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "consolidated*", "*/*")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files are.

    Attributes:
        folder: The checkpoint folder. After `config_only=True` it may hold config.json alone.
        source: Where it came from, to show and to record: the folder as typed, or `org/name@commit`.
    """

    folder: Path
    source: str


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    config_only: bool = False,
    progress: bool = True,
    cache_dir: Path | None = None,
) -> ResolvedModel:
    """Finds a model's checkpoint folder, downloading it if need be.

    An existing folder wins, then a short name, then a Hub id.

    Args:
        model: A folder, a key of `SHORT_NAMES` in any case, or `org/name`.
        revision: A branch, tag or commit of the Hub repository; its main branch if None. Not for folders.
        offline: Use no network. `HF_HUB_OFFLINE=1` has the same effect.
        config_only: config.json is enough (a dry run).
        progress: Show download progress bars on stderr.
        cache_dir: The Hub cache to use instead of the user's.

    Raises:
        InputError: The name is neither a folder, nor known, nor a Hub id; or the Hub has no such model or
            revision.
        CheckpointError: The Hub repository lacks config.json, safetensors weights, tokenizer or processor.
        UnavailableError: The files are not in the cache and cannot be downloaded.
        QavpError: The disk is full.
    """
    if folder := _local_folder(model):
        return ResolvedModel(folder, model)
    request = _Request(_repo_id(model), revision, config_only, progress, cache_dir)
    snapshot, finding = request.cached()
    if snapshot is None:
        if offline or constants.HF_HUB_OFFLINE:
            raise request.unavailable(f"{finding}, and offline mode is on")
        snapshot = request.download()
    return ResolvedModel(snapshot, f"{request.repo}@{snapshot.name}")


class _SilentTqdm(hub_tqdm):
    """A progress bar that shows nothing; the Hub client needs a whole tqdm class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Request:
    """One Hub repository and what is wanted from it."""

    repo: str
    revision: str | None
    config_only: bool
    progress: bool
    cache_dir: Path | None

    def cached(self) -> tuple[Path | None, str]:
        """Returns the snapshot in the cache if it is complete, else None and what is wrong with it."""
        try:
            folder = self._snapshot(local_files_only=True)
        except HFValidationError as error:
            raise InputError(
                f"{shown(self.repo)} is neither a folder here nor a valid Hub id (org/name); check the spelling"
            ) from error
        except LocalEntryNotFoundError:
            return None, "is not, or not completely, in the local Hub cache"
        except OSError as error:
            reason = error.strerror or error
            raise UnavailableError(
                f"cannot read {self.repo} in the local Hub cache: {reason}; check its permissions"
            ) from error
        # The Hub client returns incomplete snapshots too, when an older version of it wrote them.
        missing = self._missing(folder)
        return (None, f"is in the local Hub cache without its {missing}") if missing else (folder, "")

    def download(self) -> Path:
        """Downloads what is missing from the cache and returns the snapshot's folder."""
        try:
            folder = self._snapshot(local_files_only=False)
            missing = self._missing(folder)
            if missing:
                # With the Hub out of reach the client may return what the cache has. Then this raises.
                model_info(self.repo, revision=self.revision)
        except GatedRepoError as error:
            raise UnavailableError(
                f"{self.repo} is gated; accept its terms on its Hub page, log in with `hf auth login`, and run again"
            ) from error
        except RepositoryNotFoundError as error:
            near = _did_you_mean(self.repo, list(SHORT_NAMES.values()))
            raise InputError(
                f"there is neither a folder {self.repo} here nor a public model of that name on the Hub{near}"
                "; check the spelling, or log in with `hf auth login` if it is private"
            ) from error
        except RevisionNotFoundError as error:
            raise InputError(
                f"{self.repo} has no revision {shown(str(self.revision))}; give one of its branches, tags or commits"
            ) from error
        except DisabledRepoError as error:
            raise UnavailableError(f"{self.repo} has been disabled on the Hub; use another model") from error
        except Exception as error:
            # The Hub client lets the errors of its HTTP and transfer libraries out, and which libraries those
            # are depends on its version: there is no common base class to catch.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise QavpError(
                    f"the disk is full while downloading {self.repo}; free space, "
                    "or set HF_HOME to a folder on a larger disk"
                ) from error
            raise self.unavailable(f"cannot be downloaded ({_reason(error)})") from error
        if missing:
            raise CheckpointError(
                f"{self.repo} on the Hub has no {missing}; choose a repository with config.json, safetensors "
                "weights, tokenizer and processor"
            )
        return folder

    def unavailable(self, finding: str) -> UnavailableError:
        """Returns the error that says what to download and how to point to it."""
        revision = f" --revision {shown(self.revision)}" if self.revision else ""
        return UnavailableError(
            f"{self.repo} {finding}; on a machine with network run "
            f"`hf download {self.repo}{revision} --local-dir FOLDER`, then pass `--model FOLDER`"
        )

    def _missing(self, folder: Path) -> str | None:
        missing = _missing_config(folder)
        return missing if self.config_only else missing or _missing_weights(folder) or _missing_texts(folder)

    def _snapshot(self, *, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                self.repo,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=local_files_only,
                allow_patterns=["config.json"] if self.config_only else list(_ALLOW),
                ignore_patterns=list(_IGNORE),
                tqdm_class=None if self.progress else _SilentTqdm,
            )
        )


def _local_folder(model: str) -> Path | None:
    """Returns the folder that `model` names, or None if it may be a name on the Hub.

    Raises:
        InputError: It is a file, or can only be a path and does not exist.
    """
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL byte, unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"model {shown(model)} is no usable path or name ({reason}); check the spelling") from error
    if is_folder and model:
        return path
    if exists and model:
        raise InputError(f"model {shown(model)} is a file; give the checkpoint's folder, a short name or a Hub id")
    if model.startswith(("/", "./", "../", "~")) or model.endswith("/") or model.count("/") > 1:
        raise InputError(f"model folder {shown(model)} does not exist; check the path")
    return None


def _repo_id(model: str) -> str:
    """Returns the Hub id of a short name or Hub id.

    Raises:
        InputError: It is neither.
    """
    if known := SHORT_NAMES.get(model.lower()):
        return known
    names = list(SHORT_NAMES)
    if "/" not in model:
        near = _did_you_mean(model, names) or f"; the short names are {', '.join(names)}"
        raise InputError(f"unknown model {shown(model) or '(empty)'}{near}; or give a folder or a Hub id (org/name)")
    return model


def _did_you_mean(name: str, known: list[str]) -> str:
    near = get_close_matches(name.lower(), known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _missing_config(folder: Path) -> str | None:
    return None if (folder / "config.json").is_file() else "config.json"


def _missing_weights(folder: Path) -> str | None:
    """Names a weight file that the folder lacks, if there is one."""
    if (folder / SINGLE_FILE).is_file():
        return None
    index = folder / INDEX_FILE
    if not index.is_file():
        return f"{SINGLE_FILE} or {INDEX_FILE}"
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        lacking = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # A corrupt index is the checkpoint reader's to report.
    return lacking[0] if lacking else None


def _missing_texts(folder: Path) -> str | None:
    for choices in (_TOKENIZERS, _PROCESSORS):
        if not any((folder / name).is_file() for name in choices):
            return " or ".join(choices)
    return None


def _reason(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return shown(f"{type(error.__cause__ or error).__name__}: {lines[0]}" if lines else type(error).__name__)
