"""Bundles from folders and from the Hub, and back: over a cache built by hand, and an API that records; no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from optimum.modeling_base import OptimizedModel
from transformers import AutoConfig, GenerationMixin, LlavaConfig

from qavp_export import QavpForImageTextToText
from qavp_export.errors import BundleError, InputError, QavpError, UnavailableError
from qavp_export.huggingface import hub, modeling
from qavp_export.manifest import MANIFEST_NAME
from qavp_export.verify import verify

REPO = "someone/tiny-llava-qavp"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill_cache(cache: Path, bundle: Path, below: str = "") -> None:
    """Lays a bundle out as the Hub client does, with its branch."""
    storage = cache / f"models--{REPO.replace('/', '--')}"
    shutil.copytree(bundle, storage / "snapshots" / COMMIT / below)
    (storage / "refs").mkdir()
    (storage / "refs" / "v1").write_text(COMMIT)


def check_error(caught, error):
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)


def test_it_is_what_optimum_and_transformers_expect(pruned_model, tiny_llava):
    assert isinstance(pruned_model, OptimizedModel)
    assert isinstance(pruned_model, GenerationMixin)
    assert pruned_model.can_generate()
    assert pruned_model.main_input_name == "input_ids"
    assert (pruned_model.device, pruned_model.dtype) == (torch.device("cpu"), torch.float32)
    assert pruned_model.to("cuda") is pruned_model.eval() is pruned_model
    assert isinstance(pruned_model.config, LlavaConfig)
    assert pruned_model.config.to_dict() == AutoConfig.from_pretrained(tiny_llava).to_dict() | {
        "_name_or_path": pruned_model.config._name_or_path
    }
    assert (pruned_model.generation_config.eos_token_id, pruned_model.generation_config.pad_token_id) == (2, 0)


def test_tokens_that_no_configuration_names_are_the_manifests(pruned_bundle, tmp_path):
    bundle = shutil.copytree(pruned_bundle, tmp_path / "bundle")
    (bundle / "generation_config.json").write_text("{}")
    settings = QavpForImageTextToText.from_pretrained(bundle).generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([2], 0)


def test_saving_keeps_every_byte(pruned_model, pruned_bundle, tmp_path):
    pruned_model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(pruned_bundle)
    verify(tmp_path / "saved")
    ids = torch.tensor([[1, 5, 6, 14]])
    again = QavpForImageTextToText.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again.generate(ids, max_new_tokens=5), pruned_model.generate(ids, max_new_tokens=5))
    again.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(pruned_bundle)
    (tmp_path / "saved" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing") as caught:
        again.save_pretrained(tmp_path / "other")
    check_error(caught, BundleError)


def test_pushing_uploads_the_folder_as_it_is(pruned_model, pruned_bundle, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
            calls.append(("upload", repo_id, contents(folder_path), ignore_patterns))
            return "commit"

    monkeypatch.setattr(modeling, "HfApi", Api)
    where = {"repository_id": REPO, "private": True, "token": "secret"}
    assert pruned_model.save_pretrained(tmp_path / "saved", push_to_hub=True, **where) == "commit"
    assert calls == [
        ("token", "secret"),
        ("create", REPO, {"private": True, "exist_ok": True}),
        ("upload", REPO, contents(pruned_bundle), [".*"]),
    ]
    with pytest.raises(BundleError, match="not a bundle"):
        pruned_model.push_to_hub(tmp_path, REPO)


@pytest.mark.parametrize("below", ["", "w4a4"])
def test_from_the_cache_of_the_hub(pruned_bundle, pruned_model, tmp_path, below):
    fill_cache(tmp_path, pruned_bundle, below)
    model = QavpForImageTextToText.from_pretrained(
        REPO, subfolder=below, revision="v1", cache_dir=tmp_path, local_files_only=True
    )
    ids = torch.tensor([[1, 5, 6, 14]])
    np.testing.assert_array_equal(model(ids).logits, pruned_model(ids).logits)
    with pytest.raises(UnavailableError, match="local Hub cache") as caught:
        QavpForImageTextToText.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    check_error(caught, UnavailableError)


def test_the_manifest_is_downloaded_first_with_all_options(pruned_bundle, monkeypatch):
    calls = []

    def manifest(repo, name, **options):
        calls.append((repo, name, options))
        return str(pruned_bundle / name)

    def snapshot(repo, **options):
        calls.append((repo, options))
        return str(pruned_bundle.parent)

    monkeypatch.setattr(hub, "hf_hub_download", manifest)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    QavpForImageTextToText.from_pretrained(
        REPO, subfolder=pruned_bundle.name, revision="v2", force_download=True, token="secret", cache_dir="cache"
    )
    common = {
        "revision": "v2",
        "cache_dir": Path("cache"),
        "force_download": True,
        "local_files_only": False,
        "token": "secret",
    }
    assert calls == [
        (REPO, MANIFEST_NAME, {"subfolder": pruned_bundle.name, **common}),
        (REPO, {"allow_patterns": [f"{pruned_bundle.name}/*"], **common}),
    ]


def http_error(kind):
    """Builds one of the Hub client's HTTP errors without a response, which no code here looks at."""
    error = kind.__new__(kind)
    error.args = ("the server's own words\nand more lines",)
    return error


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (GatedRepoError, UnavailableError, "is gated"),
        (RepositoryNotFoundError, InputError, "nor a public repository"),
        (RevisionNotFoundError, InputError, "no revision"),
        (EntryNotFoundError, BundleError, f"not a bundle: it has no {MANIFEST_NAME}"),
        (ConnectionError, UnavailableError, "cannot be downloaded"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, raised, error, message):
    def refuse(*_, **__):
        raise http_error(raised)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(QavpError, match=message) as caught:
        QavpForImageTextToText.from_pretrained(REPO)
    check_error(caught, error)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("no-such-folder", {}, InputError, "neither a folder here nor a Hub id"),
        ("/no/such", {}, InputError, "neither a folder here nor a Hub id"),
        ("some one/name", {}, InputError, "nor a Hub id"),
        (".", {"subfolder": "nothing"}, BundleError, "not a bundle"),
        (REPO, {"export": True}, InputError, "optimum-cli export qavp"),
        (REPO, {"trust_remote_code": True}, InputError, "trust_remote_code"),
    ],
)
def test_names_and_options_that_cannot_be_served(name, options, error, message):
    with pytest.raises(QavpError, match=message) as caught:
        QavpForImageTextToText.from_pretrained(name, **options)
    check_error(caught, error)


def test_engine_and_configuration(pruned_bundle, tmp_path):
    with pytest.raises(UnavailableError, match="'warp'"):
        QavpForImageTextToText.from_pretrained(pruned_bundle, engine="warp")
    config = LlavaConfig()
    assert QavpForImageTextToText.from_pretrained(pruned_bundle, config).config is config
    settings = json.loads((pruned_bundle / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"image_seq_length": 7}))
    assert QavpForImageTextToText.from_pretrained(pruned_bundle, str(tmp_path)).config.image_seq_length == 7
    with pytest.raises(BundleError, match="cannot be read") as caught:
        QavpForImageTextToText.from_pretrained(pruned_bundle, str(tmp_path / "none"))
    check_error(caught, BundleError)
