"""From what the user typed to a bundle's folder: a local folder or a Hugging Face Hub id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qavp_export.errors import BundleError, InputError, UnavailableError
from qavp_export.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class HubOptions:
    """Where on the Hub and how, as Optimum's `from_pretrained` takes it.

    Attributes:
        subfolder: Folder of the repository that holds the bundle; also below a local folder.
        revision: Branch, tag or commit; None for the main branch.
        force_download: Whether to download what is in the cache already.
        local_files_only: Whether to use the cache only, no network.
        cache_dir: The Hub cache; None for the user's.
        token: Token for private repositories; None or True for the one of `hf auth login`, False for none.
    """

    subfolder: str = ""
    revision: str | None = None
    force_download: bool = False
    local_files_only: bool = False
    cache_dir: Path | None = None
    token: bool | str | None = None


def find_bundle(name: str | os.PathLike[str], options: HubOptions) -> Path:
    """Returns the bundle's folder; downloads it if it is not a local folder and not in the Hub cache.

    Raises:
        InputError: The name is neither a folder nor the id of a Hub repository, or it has no such revision.
        BundleError: The repository holds no bundle.
        UnavailableError: The files are not in the cache and cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / options.subfolder
    if folder.is_absolute() or len(folder.parts) != 2:
        raise InputError(f"{name} is neither a folder here nor a Hub id (org/name); check the path")
    return _download(os.fspath(name), options)


def _download(repo: str, options: HubOptions) -> Path:
    try:
        # First, so that the weights of a repository that is no bundle stay where they are.
        hf_hub_download(
            repo,
            MANIFEST_NAME,
            subfolder=options.subfolder or None,
            revision=options.revision,
            cache_dir=options.cache_dir,
            force_download=options.force_download,
            local_files_only=options.local_files_only,
            token=options.token,
        )
        snapshot = snapshot_download(
            repo,
            allow_patterns=[f"{options.subfolder}/*"] if options.subfolder else None,
            revision=options.revision,
            cache_dir=options.cache_dir,
            force_download=options.force_download,
            local_files_only=options.local_files_only,
            token=options.token,
        )
    except HFValidationError as error:
        raise InputError(f"{repo} is neither a folder here nor a Hub id (org/name); check the spelling") from error
    except GatedRepoError as error:
        raise UnavailableError(
            f"{repo} is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {options.revision!r}; give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder {repo} here nor a public repository of that name on the Hub; check the "
            "spelling, or pass token= if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{repo} is not, or not completely, in the local Hub cache and cannot be downloaded; on a machine with "
            f"network run `hf download {repo} --local-dir FOLDER`, then pass FOLDER"
        ) from error
    except EntryNotFoundError as error:
        raise BundleError(
            f"{repo} on the Hub is not a bundle: it has no {MANIFEST_NAME}; export it with qavp-export"
        ) from error
    except Exception as error:  # the Hub client lets the errors of its HTTP library out: no common base class
        reason = " ".join(str(error).split())
        raise UnavailableError(f"{repo} cannot be downloaded ({type(error).__name__}: {reason})") from error
    return Path(snapshot) / options.subfolder
