"""From a name to a folder: local folders, short names and Hub ids, over a cache built by hand; no network."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._paths import filter_repo_objects

from qavp_export import hub
from qavp_export.errors import CheckpointError, InputError, QavpError, UnavailableError
from qavp_export.hub import SHORT_NAMES, ResolvedModel, resolve_model

REPO = "llava-hf/llava-1.5-7b-hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMPLETE = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "processor_config.json": "{}",
}
SHARDED = {
    "config.json": "{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}),
    "s1.safetensors": "",
    "s2.safetensors": "",
    "tokenizer.model": "",
    "preprocessor_config.json": "{}",
}
ADVICE = f"on a machine with network run `hf download {REPO} --local-dir FOLDER`, then pass `--model FOLDER`"


def fill_cache(cache: Path, files: dict[str, str], repo: str = REPO, tree: list[str] | None = None) -> Path:
    """Writes a snapshot as the Hub client lays it out: refs, blobs, links, and the list of files."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / COMMIT
    for folder in (storage / "refs", storage / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (storage / "blobs" / name).write_text(content)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    if tree is not None:
        (storage / "trees").mkdir()
        listing = {name: {"size": 1, "blob_id": "0"} for name in tree}
        (storage / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    return snapshot


class FakeHub:
    """Stands in for the network: lookups in the cache are the client's own, downloads are scripted."""

    def __init__(self) -> None:
        self.downloads: list[dict[str, Any]] = []
        self.on_download: Callable[[dict[str, Any]], str] = self.refuse
        self.on_model_info: Callable[[], None] = lambda: None

    def refuse(self, request: dict[str, Any]) -> str:
        raise AssertionError(f"no download expected: {request}")

    def snapshot_download(self, repo_id: str, **request: Any) -> str:
        if request["local_files_only"]:
            return str(huggingface_hub.snapshot_download(repo_id, **request))
        self.downloads.append({"repo_id": repo_id, **request})
        return self.on_download(request)

    def model_info(self, repo_id: str, *, revision: str | None) -> None:  # noqa: ARG002
        self.on_model_info()


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "model_info", fake.model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def http_error(kind: type[Exception], text: str = "the server's own words\nand more lines") -> Exception:
    """Builds one of the Hub client's HTTP errors without a response, which no code here looks at."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def line(kind: type[QavpError], model: str, **options: Any) -> str:
    """The one line that resolving fails with."""
    with pytest.raises(kind) as caught:
        resolve_model(model, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFolders:
    def test_existing_folder(self, tmp_path: Path) -> None:
        assert resolve_model(str(tmp_path)) == ResolvedModel(tmp_path, str(tmp_path))

    @pytest.mark.parametrize("name", ["llava-1.5-7b", REPO])
    def test_folder_wins_over_short_name_and_hub_id(self, name: str, cache: Path) -> None:
        fill_cache(cache, COMPLETE)
        Path(name).mkdir(parents=True)
        assert resolve_model(name, cache_dir=cache) == ResolvedModel(Path(name), name)

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve_model("~/work").folder == tmp_path / "work"

    @pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "a/b/c", "no/"])
    def test_missing_folder(self, name: str) -> None:
        assert line(InputError, name) == f"model folder {name} does not exist; check the path"

    def test_file(self) -> None:
        Path("model.safetensors").write_text("")
        assert "model model.safetensors is a file; give the checkpoint's folder" in line(
            InputError, "model.safetensors"
        )

    @pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-here/x", "", "two\nlines"])
    def test_impossible_names(self, name: str) -> None:
        assert len(line(InputError, name)) < 600


class TestShortNames:
    @pytest.mark.parametrize(("name", "repo"), SHORT_NAMES.items())
    def test_all_resolve(self, name: str, repo: str, cache: Path) -> None:
        snapshot = fill_cache(cache, COMPLETE, repo)
        assert resolve_model(name.upper(), cache_dir=cache) == ResolvedModel(snapshot, f"{repo}@{COMMIT}")

    def test_mapping(self) -> None:
        assert SHORT_NAMES["llava-1.5-7b"] == REPO
        assert SHORT_NAMES["llava-1.5-13b"] == "llava-hf/llava-1.5-13b-hf"
        with pytest.raises(TypeError):
            SHORT_NAMES["x"] = "y"  # type: ignore[index]

    def test_close_match(self) -> None:
        text = line(InputError, "lava-1.5-7b")
        assert text.startswith("unknown model lava-1.5-7b; did you mean llava-1.5-7b or ")

    def test_no_match_lists_all(self) -> None:
        text = line(InputError, "gpt")
        assert all(name in text for name in SHORT_NAMES)

    @pytest.mark.parametrize("name", ["a/b..c", "-a/b", "a b/c", "a/" + "b" * 200])
    def test_invalid_hub_id(self, name: str) -> None:
        assert "is neither a folder here nor a valid Hub id" in line(InputError, name)


class TestCache:
    @pytest.mark.parametrize("files", [COMPLETE, SHARDED])
    @pytest.mark.parametrize("offline", [True, False])
    def test_complete_snapshot_needs_no_network(self, files: dict[str, str], offline: bool, cache: Path) -> None:
        snapshot = fill_cache(cache, files)
        assert resolve_model(REPO, offline=offline, cache_dir=cache) == ResolvedModel(snapshot, f"{REPO}@{COMMIT}")

    def test_user_cache(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        snapshot = fill_cache(cache, COMPLETE)
        assert resolve_model("llava-1.5-7b", offline=True).folder == snapshot

    def test_revision(self, cache: Path) -> None:
        snapshot = fill_cache(cache, COMPLETE)
        assert resolve_model(REPO, revision=COMMIT, cache_dir=cache).folder == snapshot
        text = line(UnavailableError, REPO, revision="v2", offline=True, cache_dir=cache)
        assert f"`hf download {REPO} --revision v2 --local-dir FOLDER`" in text

    def test_files_never_wanted_may_be_missing(self, cache: Path) -> None:
        unwanted = [
            "README.md",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "modeling.py",
            "onnx/config.json",
        ]
        snapshot = fill_cache(cache, COMPLETE, tree=[*COMPLETE, *unwanted])
        assert resolve_model(REPO, offline=True, cache_dir=cache).folder == snapshot

    def test_listed_file_missing(self, cache: Path) -> None:
        fill_cache(cache, COMPLETE, tree=[*COMPLETE, "generation_config.json"])
        assert "is not, or not completely, in the local Hub cache" in line(
            UnavailableError, REPO, offline=True, cache_dir=cache
        )

    @pytest.mark.parametrize(
        ("files", "missing", "named"),
        [
            (COMPLETE, "config.json", "config.json"),
            (COMPLETE, "model.safetensors", "model.safetensors or model.safetensors.index.json"),
            (COMPLETE, "tokenizer.json", "tokenizer.json or tokenizer.model or vocab.json"),
            (COMPLETE, "processor_config.json", "preprocessor_config.json or processor_config.json"),
            (SHARDED, "s2.safetensors", "s2.safetensors"),
        ],
    )
    def test_partial_snapshot(self, files: dict[str, str], missing: str, named: str, cache: Path) -> None:
        fill_cache(cache, {name: text for name, text in files.items() if name != missing})
        assert line(UnavailableError, REPO, offline=True, cache_dir=cache) == (
            f"{REPO} is in the local Hub cache without its {named}, and offline mode is on; {ADVICE}"
        )

    def test_corrupt_index_is_left_to_the_checkpoint_reader(self, cache: Path) -> None:
        snapshot = fill_cache(cache, SHARDED | {"model.safetensors.index.json": '{"weight_map": 5}'})
        assert resolve_model(REPO, offline=True, cache_dir=cache).folder == snapshot

    def test_config_only(self, cache: Path) -> None:
        snapshot = fill_cache(cache, {"config.json": "{}"}, tree=list(COMPLETE))
        assert resolve_model(REPO, config_only=True, offline=True, cache_dir=cache).folder == snapshot


class TestOffline:
    @pytest.mark.parametrize("name", ["llava-1.5-7b", REPO])
    def test_says_what_to_download(self, name: str, cache: Path) -> None:
        assert line(UnavailableError, name, offline=True, cache_dir=cache) == (
            f"{REPO} is not, or not completely, in the local Hub cache, and offline mode is on; {ADVICE}"
        )

    def test_exit_code(self) -> None:
        assert UnavailableError.exit_code == 3

    def test_environment_variable(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "offline mode is on" in line(UnavailableError, REPO, cache_dir=cache)


class TestDownload:
    @pytest.mark.parametrize("before", [{}, {"config.json": "{}"}, {"s1.safetensors": ""}])
    def test_missing_files_are_downloaded(self, before: dict[str, str], cache: Path, fake: FakeHub) -> None:
        if before:
            fill_cache(cache, before)
        fake.on_download = lambda _: str(fill_cache(cache, SHARDED))
        resolved = resolve_model("llava-1.5-7b", cache_dir=cache)
        assert resolved.source == f"{REPO}@{COMMIT}"
        assert sorted(path.name for path in resolved.folder.iterdir()) == sorted(SHARDED)
        assert [request["repo_id"] for request in fake.downloads] == [REPO]

    def test_only_what_is_needed_is_asked_for(self, cache: Path, fake: FakeHub) -> None:
        fake.on_download = lambda _: str(fill_cache(cache, COMPLETE))
        resolve_model(REPO, cache_dir=cache)
        request = fake.downloads[0]
        files = [
            *SHARDED, *COMPLETE, "generation_config.json", "merges.txt", "chat_template.jinja",
            "tokenizer_config.json", "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json",
            "training_args.bin", "model.pt", "tokenizer.pkl", "modeling_llava.py", "consolidated.safetensors",
            "original/model.safetensors", "onnx/model.onnx", "flax_model.msgpack",
        ]  # fmt: skip
        chosen = filter_repo_objects(
            files, allow_patterns=request["allow_patterns"], ignore_patterns=request["ignore_patterns"]
        )
        wanted = {*SHARDED, *COMPLETE, "generation_config.json", "merges.txt", "chat_template.jinja"}
        assert set(chosen) == wanted | {"tokenizer_config.json"}

    def test_config_only_asks_for_nothing_else(self, cache: Path, fake: FakeHub) -> None:
        fake.on_download = lambda _: str(fill_cache(cache, {"config.json": "{}"}))
        assert resolve_model(REPO, config_only=True, cache_dir=cache).source == f"{REPO}@{COMMIT}"
        assert fake.downloads[0]["allow_patterns"] == ["config.json"]

    def test_progress_can_be_silenced(self, cache: Path, fake: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
        fake.on_download = lambda _: str(fill_cache(cache, COMPLETE))
        resolve_model(REPO, cache_dir=cache, progress=False)
        with fake.downloads[0]["tqdm_class"](total=10, desc="bytes") as bar:
            bar.update(10)
            bar.set_description_str("done")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("error", "kind", "expected"),
        [
            (http_error(GatedRepoError), UnavailableError, f"{REPO} is gated; accept its terms"),
            (
                http_error(RepositoryNotFoundError),
                InputError,
                f"there is neither a folder {REPO} here nor a public model",
            ),
            (http_error(RevisionNotFoundError), InputError, f"{REPO} has no revision v9"),
            (http_error(DisabledRepoError), UnavailableError, f"{REPO} has been disabled on the Hub"),
            (
                LocalEntryNotFoundError("no route\nto host"),
                UnavailableError,
                "(LocalEntryNotFoundError: no route); on a",
            ),
            (
                ConnectionResetError(104, "reset by peer"),
                UnavailableError,
                "cannot be downloaded (ConnectionResetError",
            ),
            (
                RuntimeError(),
                UnavailableError,
                "cannot be downloaded (RuntimeError); on a machine with network",
            ),
            (
                OSError(errno.ENOSPC, "No space left on device"),
                QavpError,
                "the disk is full while downloading",
            ),
        ],
    )
    def test_failures(self, error: Exception, kind: type[QavpError], expected: str, cache: Path, fake: FakeHub) -> None:
        fake.on_download = failing(error)
        text = line(kind, REPO, revision="v9", cache_dir=cache)
        assert expected in text
        if "cannot be downloaded" in text:
            assert f"`hf download {REPO} --revision v9 --local-dir FOLDER`, then pass `--model FOLDER`" in text

    def test_cause_is_shown(self, cache: Path, fake: FakeHub) -> None:
        error = LocalEntryNotFoundError("please check your connection")
        error.__cause__ = ConnectionError("name resolution failed")
        fake.on_download = failing(error)
        assert "(ConnectionError: name resolution failed)" in line(UnavailableError, REPO, cache_dir=cache)

    def test_nonexistent_repository_close_to_a_known_one(self, cache: Path, fake: FakeHub) -> None:
        fake.on_download = failing(http_error(RepositoryNotFoundError))
        text = line(InputError, "llava-hf/llava-1.5-7b", cache_dir=cache)
        assert f"did you mean {REPO}" in text

    def test_interrupt_passes(self, cache: Path, fake: FakeHub) -> None:
        def interrupt(_: dict[str, Any]) -> str:
            raise KeyboardInterrupt

        fake.on_download = interrupt
        with pytest.raises(KeyboardInterrupt):
            resolve_model(REPO, cache_dir=cache)

    def test_repository_without_safetensors(self, cache: Path, fake: FakeHub) -> None:
        files = {name: text for name, text in COMPLETE.items() if name != "model.safetensors"}
        fake.on_download = lambda _: str(fill_cache(cache, files))
        text = line(CheckpointError, REPO, cache_dir=cache)
        assert text.startswith(f"{REPO} on the Hub has no model.safetensors or model.safetensors.index.json; choose")

    def test_client_falls_back_to_a_partial_snapshot(self, cache: Path, fake: FakeHub) -> None:
        # With the Hub out of reach, the client returns what an older version of it left in the cache.
        snapshot = fill_cache(cache, {"config.json": "{}"})
        fake.on_download = lambda _: str(snapshot)
        fake.on_model_info = failing(ConnectionError("unreachable"))
        text = line(UnavailableError, REPO, cache_dir=cache)
        assert text == f"{REPO} cannot be downloaded (ConnectionError: unreachable); {ADVICE}"
