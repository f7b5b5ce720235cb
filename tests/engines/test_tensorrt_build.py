"""What builders report, and what an export makes of it, with a builder that is not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qavp_export import pipeline
from qavp_export.engines.tensorrt import build, process
from qavp_export.engines.tensorrt.build import build_tensorrt_engines, check_targets
from qavp_export.engines.tensorrt.inspector import mismatches, parse_json, parse_log, realized_precision
from qavp_export.engines.tensorrt.keys import TENSORRT, TENSORRT_RTX, EngineKeys
from qavp_export.engines.tensorrt.process import run_worker
from qavp_export.engines.tensorrt.targets import EngineTargets, check_formats
from qavp_export.engines.tensorrt.worker import Report, Request
from qavp_export.errors import InputError, QavpError, UnavailableError
from qavp_export.manifest import Manifest
from qavp_export.parity import Parity
from qavp_export.pipeline import export
from qavp_export.recipe import make_recipe

# From TensorRT-RTX 1.7.1's log: a fused product with 4-bit weights, two products in one, one whose weight is
# expanded in every run, NVFP4, attention, and what is no product.
LOG = """
Name: __myl_ReplCastMulCastFc_myl0_7, LayerType: runtime_fusion, Inputs: [ { Name: __mye_44_myl0, Dimensions: [-1,96], Strides: [96,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: c1, Dimensions: [96,32], Strides: [1,96], StrideOrder: [0,1], Datatype: Int4, Format: (Transposed) Transposed format }, { Name: c2, Dimensions: [3,32], Strides: [1,3], StrideOrder: [0,1], Datatype: Float, Format: (Transposed) Transposed format }], Outputs: [ { Name: o, Dimensions: [-1,32], Strides: [32,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: /k_proj/MatMul/weight/DequantizeLinear][ONNX Layer: /k_proj/MatMul]
Name: /up_proj/MatMul_U57+/gate_proj/MatMul_U58_myl0_10, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,96], Strides: [96,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: c, Dimensions: [96,320], Strides: [320,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: o, Dimensions: [-1,320], Strides: [320,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /up_proj/MatMul][ONNX Layer: /gate_proj/MatMul]
Name: /lm_head/MatMul_myl0_59, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,96], Strides: [96,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }, { Name: w, Dimensions: [96,68], Strides: [68,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: o, Dimensions: [-1,68], Strides: [68,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /lm_head/MatMul]
Name: __myl_SlicResh_myl0_60, LayerType: kgen, Inputs: [ { Name: y, Dimensions: [-1,68], Strides: [68,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: logits, Dimensions: [-1,1,67], Strides: [67,67,1], StrideOrder: [2,1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: __myl_SlicResh_0xb3a8, StreamId: 0, Metadata: [ONNX Layer: /lm_head/MatMul]
Name: /down_proj/MatMul_myl0_22, LayerType: gemm, Inputs: [ { Name: TRT_FP4DynamicQuantize_output_0.1_myl0, Dimensions: [-1,96], Strides: [96,1], StrideOrder: [1,0], Datatype: FP4E2M1, Format: (Linear) Row major linear format }, { Name: s, Dimensions: [-1,4,32,2,4], Strides: [1024,256,8,4,1], StrideOrder: [4,3,2,1,0], Datatype: FP8, Format: (Arbitrary) Format with stride order = [4,1,2,3,0] }], Constants: [ { Name: c, Dimensions: [96,160], Strides: [1,96], StrideOrder: [0,1], Datatype: FP4E2M1, Format: (Transposed) Transposed format }, { Name: g, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: o, Dimensions: [-1,160], Strides: [160,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: /down_proj/MatMul]
Name: _gemm_mha_v2_myl0_13, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [-1,-1,16], Strides: [16,-1,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0] }, { Name: k, Dimensions: [-1,16,64], Strides: [16,1,-1], StrideOrder: [1,0,2], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,0,2] }], Constants: [], Outputs: [ { Name: o, Dimensions: [-1,-1,16], Strides: [16,-1,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0] }], TacticName: _gemm_mha_v2_0x4cee, StreamId: 0, Metadata: [ONNX Layer: /attn/Attention]
Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Timing runner: Name: none of these, LayerType: gemm
"""  # noqa: E501
NODES = ("/k_proj/MatMul", "/up_proj/MatMul", "/gate_proj/MatMul", "/lm_head/MatMul", "/down_proj/MatMul")
PRECISION = {
    "/k_proj/MatMul": "int4 x float32",
    "/up_proj/MatMul": "float16 x float16",
    "/gate_proj/MatMul": "float16 x float16",
    "/lm_head/MatMul": "float32 x float32",
    "/down_proj/MatMul": "fp4 x fp4",
    "/attn/Attention": "float16",
}


def _tensor(dtype: str, *sizes: int) -> dict[str, Any]:
    return {"Name": "t", "Dimensions": list(sizes), "Datatype": dtype, "Format": "Row major linear format"}


# As TensorRT 10 and 11 write `LayerInformationFormat.JSON`: kernels of fused graphs have constants and plugins do not,
# and tensors of TensorRT 10's own layers name type and format in one phrase.
JSON = {
    "Layers": [
        {
            "Name": "/fc1/MatMul_myl0_4",
            "LayerType": "gemm",
            "Inputs": [_tensor("Half", -1, 64)],
            "Outputs": [_tensor("Half", -1, 32)],
            "Constants": [_tensor("Half", 64, 32), _tensor("Float", 1)],
            "TacticName": "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: /fc1/MatMul]\x1e[ONNX Layer: /fc1/MatMul/float16/input_0]",
        },
        {
            "Name": "/q_proj/MatMul/W4A4MatMul",
            "LayerType": "PluginV3",
            "Inputs": [_tensor("Int8", -1, 64), _tensor("Float", -1, 1), _tensor("Int8", 32, 32)],
            "Outputs": [_tensor("Float", -1, 32)],
            "TacticValue": "0x1",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: /q_proj/MatMul/W4A4MatMul]",
        },
        {
            "Name": "/patch/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Dimensions": [1, 3, 40, 40], "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [],
            "Constants": [
                {"Name": "w", "Dimensions": [32, 3, 8, 8], "Format/Datatype": "Row major linear FP16 format"}
            ],
            "Metadata": "[ONNX Layer: /patch/Conv]",
        },
    ],
    "Bindings": ["x", "y"],
}


def test_log_lines_tell_what_products_multiply() -> None:
    layers = parse_log(LOG.splitlines())
    assert [layer.kind for layer in layers].count("gemm") == 3
    assert realized_precision(layers, [*NODES, "/attn/Attention"]) == PRECISION


def test_the_inspectors_json_tells_the_same() -> None:
    layers = parse_json(json.dumps(JSON))
    assert realized_precision(layers, ["/fc1/MatMul", "/q_proj/MatMul", "/patch/Conv", "/none"]) == {
        "/fc1/MatMul": "float16 x float16",
        "/q_proj/MatMul": "plugin",
        "/patch/Conv": "float16 x float16",
        "/none": "unknown",
    }


@pytest.mark.parametrize("text", ['{"Layers": ["/fc1/MatMul"], "Bindings": []}', "[]", "{}", "not JSON"])
def test_an_engine_without_detail_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"inspector tells no details|Expecting value"):
        parse_json(text)


def test_layers_inside_a_function_belong_to_its_call() -> None:
    line = LOG.splitlines()[1].replace("/k_proj/MatMul]", "node_of_y | /call (TwoLevelScale)]")
    (layer,) = parse_log([line])
    assert layer.nodes == ("/k_proj/MatMul/weight/DequantizeLinear", "/call")


def test_only_other_precisions_are_mismatches() -> None:
    expected = {"a": "fp4 x fp4", "b": "float16 x float16", "c": "plugin"}
    realized = {"a": "float32 x float32", "b": "float16 x float16", "c": "unknown"}
    assert mismatches(expected, realized) == [
        "a runs in float32 x float32, not fp4 x fp4",
        "c runs in unknown, not plugin",
    ]


@pytest.mark.parametrize(
    ("precisions", "capabilities", "message"),
    [
        ({"nvfp4"}, (89,), r"nvfp4 needs .* 10\.0 or newer, not 8\.9; .*: w4a4, w4a8, w4a16, w8a8, w8a16, none$"),
        ({"w4a4", "w8a16"}, (75,), r"w4a4 needs .* 8\.0 or newer, not 7\.5; .*: w8a8, w8a16, none$"),
        ({"nvfp4"}, (100, 90), r"not 9\.0"),
    ],
)
def test_formats_that_a_gpu_does_not_run(precisions: set[str], capabilities: tuple[int, ...], message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        check_formats(precisions, capabilities)


def test_formats_that_it_runs() -> None:
    check_formats({"nvfp4", "w8a16", "w4a4"}, (100, 120))
    check_formats({"w8a8", "float"}, (75,))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_tensorrt_that_is_not_installed_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError,
        match=r"'tensorrt' is not available here: tensorrt cannot be imported .*pip install 'qavp-export\[tensorrt",
    ):
        check_targets(EngineTargets((TENSORRT,)), {"w4a4"}, 128, 3)
    with pytest.raises(UnavailableError, match="does not build this for --sm 90"):
        check_targets(EngineTargets((TENSORRT_RTX,), (90,)), {"w4a4"}, 128, 3)
    with pytest.raises(InputError, match="--sm goes with"):
        check_targets(EngineTargets((TENSORRT,), (89,)), {"w4a4"}, 128, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a Python program in the builder's place."""

    def replace(program: str) -> None:
        path = tmp_path / "odd_worker.py"
        path.write_text(program)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(process, "_WORKER", "odd_worker")

    return replace


def test_a_builder_that_breaks_down_is_one_line(worker: Callable[[str], None], tmp_path: Path) -> None:
    worker("import os, sys; print('before', file=sys.stderr); print('no more memory', file=sys.stderr); os._exit(9)")
    with pytest.raises(QavpError, match=r"builds engines for tensorrt-rtx ended with 9 \(no more memory\)"):
        run_worker(Request(TENSORRT_RTX, ""), tmp_path)


def test_an_interrupted_build_leaves_no_process(worker: Callable[[str], None], tmp_path: Path) -> None:
    worker(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('noise'); print('progress 1 6', flush=True); time.sleep(600)"
    )
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(Request(TENSORRT_RTX, ""), tmp_path, interrupt)
    assert seen == [(1, 6)]
    assert not (Path("/proc") / (tmp_path / "pid").read_text()).exists() or sys.platform != "linux"


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the default recipe."""
    target = tmp_path_factory.mktemp("build") / "bundle"
    export(tiny_llava, make_recipe("rtn", {}), target, name="tiny", force=False, progress=lambda *_: None)
    return target


class FakeBuilder:
    """Stands for TensorRT 11 on a Hopper GPU: what it reports of layers is as the network asks, but for `changes`."""

    def __init__(self, changes: Mapping[str, str]) -> None:
        self.changes = changes
        self.requests: list[Request] = []

    def __call__(self, request: Request, work: Path, progress: Callable[[int, int], None] | None = None) -> Report:
        del work
        self.requests.append(request)
        if request.engine is not None:
            assert Path(str(request.model)).is_file()
            Path(request.engine).write_bytes(b"engine of " + Path(str(request.model)).name.encode())
        if progress is not None:
            progress(6, 6)
        return Report("11.4.0.106", 90, 13000, (), json.dumps({"Layers": self._layers(request)}))

    def _layers(self, request: Request) -> list[dict[str, Any]]:
        import onnx

        if request.model is None:
            return []
        nodes = onnx.load(request.model, load_external_data=False).graph.node
        return [self._layer(node.name, node.op_type) for node in nodes]

    def _layer(self, name: str, op_type: str) -> dict[str, Any]:
        dtype = self.changes.get(name, "Half")
        is_plugin = op_type == "W4A4MatMul"
        kind = {"MatMul": "gemm", "Conv": "CaskConvolution", "Attention": "kgen"}.get(op_type, "kgen")
        constants = [_tensor(dtype, 8, 8)] if op_type in ("MatMul", "Conv") else []
        return {
            "Name": name,
            "LayerType": "PluginV3" if is_plugin and name not in self.changes else kind,
            "Inputs": [_tensor(dtype, -1, 8)],
            "Constants": constants,
            "Metadata": f"[ONNX Layer: {name}]",
        }


def _build(bundle: Path, tmp_path: Path, fake: FakeBuilder, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(build, "run_worker", fake)
    checked = check_targets(EngineTargets((TENSORRT,), **options), {"w4a4"}, 128, 3)
    work = tmp_path / "work"
    work.mkdir()
    try:
        return build_tensorrt_engines(bundle, Manifest.read(bundle), checked, work, lambda *_: None)[TENSORRT]
    finally:
        assert list(work.iterdir()) == []


def test_an_export_asks_each_library_once(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBuilder({})
    monkeypatch.setattr(build, "run_worker", fake)
    # What they do is tested elsewhere, and takes the most time here.
    monkeypatch.setattr(pipeline, "build_engines", lambda *_: {})
    monkeypatch.setattr(pipeline, "compare", lambda *_: Parity("DECODER NOT RUN", "", "nothing"))
    targets = EngineTargets((TENSORRT, TENSORRT_RTX), (89,), allow_precision_fallback=True)
    target, recipe = tmp_path / "bundle", make_recipe("none", {"select": "topk"})
    manifest = export(tiny_llava, recipe, target, name="tiny", force=False, progress=lambda *_: None, targets=targets)
    assert [request.flavour for request in fake.requests if request.model is None] == [TENSORRT, TENSORRT_RTX]
    # What was found on asking is what the networks are made for.
    assert manifest.engines[TENSORRT]["cache"] == "preallocated"
    assert {name: engine["version"] for name, engine in manifest.engines.items()} == dict.fromkeys(
        (TENSORRT, TENSORRT_RTX), "11.4.0.106"
    )


def test_engines_of_the_gpu_here(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBuilder({})
    described = _build(bundle, tmp_path, fake, monkeypatch, max_tokens=80, max_batch=2)
    keys = EngineKeys.read(bundle, TENSORRT)
    assert (keys.version, keys.capabilities, keys.driver) == ("11.4.0.106", (90,), 13000)
    assert described["capabilities"] == [90]
    assert described["precision"]["decoder"] == {"float16": 2, "plugin": 14, "float16 x float16": 1}
    layer = "/model/layers.0/attn/q_proj/MatMul"
    assert described["layers"]["decoder"][layer] == ["w4a4", "plugin"]
    assert described["notes"] == []
    assert described["cache"] == keys.cache == "preallocated"
    folder = bundle / "engines" / TENSORRT
    assert json.loads((folder / "decoder.layers.json").read_text())["Layers"]
    assert (folder / "decoder.engine").read_bytes() == b"engine of decoder.onnx"
    decoder = fake.requests[-1]
    assert decoder.plugins
    assert decoder.timing_cache == str(folder / "timing.cache")
    assert decoder.capabilities == ()
    # Prompts, then single tokens.
    assert [profile["inputs_embeds"][2][:2] for profile in decoder.profiles] == [[2, 80], [2, 1]]
    # One file for all graphs.
    assert len({request.timing_cache for request in fake.requests if request.model is not None}) == 1


@pytest.mark.parametrize("layer", ["/model/layers.1/mlp/down_proj/MatMul/W4A4MatMul", "/lm_head/MatMul"])
def test_a_layer_in_another_precision_fails_unless_allowed(
    layer: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeBuilder({layer: "Float"})
    name = layer.removesuffix("/W4A4MatMul")
    with pytest.raises(QavpError, match=rf"built 1 layers .*: {name} runs in float32.*--allow-precision-fallback"):
        _build(bundle, tmp_path, fake, monkeypatch)
    (tmp_path / "work").rmdir()
    described = _build(bundle, tmp_path, fake, monkeypatch, allow_precision_fallback=True)
    assert described["layers"]["decoder"][name][1].startswith("float32")
    (note,) = described["notes"]
    assert note.startswith(f"{name} runs in float32")


def test_what_no_plugin_takes_is_in_the_notes(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = {name: getattr(build, name) for name in ("lower_vision", "lower_decoder")}
    for name, function in lower.items():
        told = lambda *given, name=name, function=function: dataclasses.replace(function(*given), notes=(name,))  # noqa: E731
        monkeypatch.setattr(build, name, told)
    described = _build(bundle, tmp_path, FakeBuilder({}), monkeypatch)
    assert described["notes"] == ["lower_vision", "lower_decoder"]
    assert EngineKeys.read(bundle, TENSORRT).notes == ("lower_vision", "lower_decoder")


def test_what_fails_names_engine_and_graph(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: Request, *_: Any) -> Report:
        if request.model is None:
            return Report("11.4.0.106", 90)
        raise UnavailableError("no GPU")

    monkeypatch.setattr(build, "run_worker", broken)
    checked = check_targets(EngineTargets((TENSORRT,)), {"w4a4"}, 128, 3)
    with pytest.raises(UnavailableError, match="tensorrt, vision encoder: no GPU"):
        build_tensorrt_engines(bundle, Manifest.read(bundle), checked, tmp_path, lambda *_: None)


def test_requests_and_reports_survive_the_way_to_the_other_process() -> None:
    request = Request(TENSORRT, "r", "m", "e", ({"x": [[1], [2], [3]]},), ("k",), (89,), "t", plugins=True)
    back = Request(**json.loads(json.dumps(dataclasses.asdict(request))))
    assert back.profiles[0] == request.profiles[0]
    assert dataclasses.replace(back, profiles=(), values=(), capabilities=()) == dataclasses.replace(
        request, profiles=(), values=(), capabilities=()
    )
