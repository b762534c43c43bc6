"""Bundles are programs from elsewhere: a wrong one is refused with a reason, and the service lists its models."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import socket

import grpc
import numpy as np
import onnx
import pytest
from grpc_status import rpc_status
from onnx import TensorProto, helper, numpy_helper

from ferryman.v1 import model_pb2
from ferryman_service.bundle.graph_check import check_graphs
from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    DECODER_FILE,
    EMBEDDING_FILE,
    ENCODER_FILE,
    MANIFEST_FILE,
    REORDER_FILE,
    SUBWORDS_FILE,
    read_manifest,
    seal,
)
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.launch.trial import TrialLimits, examine_bundle, try_to_load
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.loopback_service import LoopbackService

GRAPHS = tuple(f"{half}{kind}.onnx" for kind in ("", ".int8", ".fp16") for half in ("encoder", "decoder"))
SOAK = "FERRYMAN_SOAK" in os.environ


def change(path, value):
    """Set a value in the manifest."""

    def edit(values):
        *parents, name = path.split("/")
        for parent in parents:
            values = values[parent]
        values[name] = value

    return edit


def text(old, new):
    """Replace a piece of the manifest's text once."""
    return lambda content: content.replace(old, new, 1)


LINEAGE, SCORES, ARCHITECTURE = "header/lineage", "header/scores", "header/architecture"
DECODER_DIGEST = f"files/{DECODER_FILE}"
VALUES = {
    "parameters as text": (change("header/parameters", "many"), "header.parameters is 'many'"),
    "parameters true": (change("header/parameters", True), "header.parameters"),
    "parameters with a fraction": (change("header/parameters", 1.5), "header.parameters"),
    "no parameters": (change("header/parameters", 0), "header.parameters"),
    "negative bleu": (change(f"{SCORES}/bleu", -1), "header.scores.bleu"),
    "bleu as text": (change(f"{SCORES}/bleu", "12"), "header.scores.bleu"),
    "pairs beyond 32 bits": (change(f"{SCORES}/translated_pairs", 2**31), "header.scores.translated_pairs"),
    "a million layers": (change(f"{ARCHITECTURE}/decoder_layers", 10**6), "header.architecture.decoder_layers"),
    "no heads": (change(f"{ARCHITECTURE}/heads", 0), "header.architecture.heads"),
    "another width than the recipe": (change(f"{ARCHITECTURE}/d_model", 64), "header.architecture.d_model"),
    "a vocabulary of a billion": (change(f"{ARCHITECTURE}/vocabulary_size", 10**9), "vocabulary_size"),
    "rotations as a number": (change(f"{ARCHITECTURE}/rotates", 0), "header.architecture.rotates"),
    "sentences of a million tokens": (change("header/max_sentence_tokens", 10**6), "header.max_sentence_tokens"),
    "a path as run": (change(f"{LINEAGE}/run_id", "run_../../../etc"), "header.lineage.run_id"),
    "a digest as list": (change(f"{LINEAGE}/corpus_digest", [0]), "header.lineage.corpus_digest"),
    "a long language": (change(f"{LINEAGE}/source_language", "e" * 100_000), "header.lineage.source_language"),
    "a language of two lines": (change(f"{LINEAGE}/source_language", "en\nde"), "header.lineage.source_language"),
    "half a character": (change(f"{LINEAGE}/target_language", "\ud800"), "header.lineage.target_language"),
    "an unknown norm": (change(f"{LINEAGE}/recipe/model/norm", "no such"), "header.lineage.recipe.model.norm"),
    "a dropout of 7": (change(f"{LINEAGE}/recipe/model/dropout", 7), "header.lineage.recipe.model.dropout"),
    "a seed as text": (change(f"{LINEAGE}/recipe/seed", "x"), "header.lineage.recipe.seed"),
    "no lineage": (change(LINEAGE, None), "header.lineage"),
    "a header as list": (change("header", []), "header"),
    "scores of no pairs": (change("header/int8", {"pairs": 5}), "header.int8"),
    "a field too many": (change(f"{SCORES}/surprise", 1), "header.scores.'surprise'"),
    "a negative size": (change(f"{DECODER_DIGEST}/size_bytes", -1), f"files.{DECODER_FILE}.size_bytes"),
    "three gibibytes": (change(f"{DECODER_DIGEST}/size_bytes", 3 << 30), f"files.{DECODER_FILE}.size_bytes"),
    "no digest": (change(f"{DECODER_DIGEST}/sha256", "xx"), f"files.{DECODER_FILE}.sha256"),
    "a path as file": (change("files/..~1secret".replace("~1", "\\"), {}), "names"),
    "a missing file": (lambda values: values["files"].pop(DECODER_FILE), "names"),
    "a true format": (change("format_version", True), "format version True"),
}
TEXTS = {
    "nan": (text(b'"bleu": 12.5', b'"bleu": NaN'), "NaN"),
    "infinity": (text(b'"bleu": 12.5', b'"bleu": 1e999'), "header.scores.bleu"),
    "thousands of digits": (text(b'"bleu": 12.5', b'"bleu": ' + b"9" * 5000), "not JSON"),
    "400 digits": (text(b'"bleu": 12.5', b'"bleu": ' + b"9" * 400), "header.scores.bleu"),
    "a field twice": (text(b'"bleu": 12.5', b'"bleu": 1, "bleu": 2'), "twice"),
    "deep nesting": (lambda content: b"[" * 500_000, "nested too deeply"),
    "utf-16": (lambda content: content.decode().encode("utf-16"), "not JSON in UTF-8"),
    "two mebibytes": (lambda content: content + b" " * (2 << 20), "over"),
    "nothing": (lambda content: b"", "not JSON"),
}


def replace_by(make):
    """Put something else in a file's place."""

    def mutate(path):
        path.rename(path.with_name("aside"))
        make(path)

    return mutate


def make_socket(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


NOT_FILES = {
    "a link to the file itself": (replace_by(lambda path: path.symlink_to("aside")), "is a link"),
    "a link to a device": (replace_by(lambda path: path.symlink_to("/dev/zero")), "is a link"),
    "a link to nothing": (replace_by(lambda path: path.symlink_to("nowhere")), "is a link"),
    "a pipe": (replace_by(os.mkfifo), "a pipe"),
    "a folder": (replace_by(os.mkdir), "a folder"),
    "a socket": (replace_by(make_socket), "is a link, a folder, a pipe"),
    "a missing file": (replace_by(lambda path: None), "No such file"),
}
CHANGED_FILES = {
    "a shorter file": (lambda path: os.truncate(path, 10), "bytes"),
    "a longer file": (grow, "bytes"),
    "a sparse file of three gibibytes": (lambda path: os.truncate(path, 3 << 30), "bytes"),
    "a changed byte": (flip, "SHA-256"),
}


def add_node(operator, *, domain="", **attributes):
    """Append a node that takes and gives nothing of the others."""

    def mutate(model):
        model.graph.node.append(helper.make_node(operator, ["x"], ["of_nobody"], domain=domain, **attributes))

    return mutate


def subgraph():
    return helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [], [])


def attribute_of_first(**attribute):
    (name, value) = next(iter(attribute.items()))
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute(name, value))


def add_function(model):
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], [helper.make_opsetid("", 24)]))


def external_data(model):
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../../etc/passwd")


def sparse_tensor(model):
    model.graph.sparse_initializer.add().dims.append(3)


def first_constant(edit):
    def mutate(model):
        edit(max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data)))

    return mutate


def float_data(tensor):
    tensor.ClearField("raw_data")
    tensor.float_data.append(1.0)


def text_data(tensor):
    tensor.data_type = TensorProto.STRING
    tensor.string_data.append(b"x")


def huge_dimensions(tensor):
    tensor.dims[:] = [1 << 40, 1 << 40]


def dimension(value):
    def mutate(model):
        model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = value

    return mutate


def lengths_from_constant(model):
    """Let attention take lengths that stand in the file: a kernel would read behind its buffers."""
    model.graph.initializer.append(numpy_helper.from_array(np.full(1, 1 << 30, np.int32), "lie"))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in ("source_lengths", "past_lengths"):
                node.input[place] = "lie"


def more_heads(model):
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.i = 1024


def first_node(name, value):
    return lambda model: setattr(model.graph.node[0], name, value)


MODELS = {
    "a loop": (add_node("Loop", body=subgraph()), "refused"),
    "a loop without a body": (add_node("Loop"), "operator 'Loop'"),
    "a condition": (add_node("If", then_branch=subgraph(), else_branch=subgraph()), "refused"),
    "a scan": (add_node("Scan", body=subgraph(), num_scan_inputs=1), "refused"),
    "a subgraph elsewhere": (attribute_of_first(body=subgraph()), "a subgraph"),
    "many subgraphs": (attribute_of_first(bodies=[subgraph()]), "subgraphs"),
    "a function": (add_function, "functions"),
    "an operator of somebody": (add_node("Exec", domain="evil"), "operator 'evil.Exec'"),
    "another operator of ONNX Runtime": (add_node("BeamSearch", domain="com.microsoft"), "BeamSearch"),
    "an operator that makes large tensors": (add_node("Expand"), "operator 'Expand'"),
    "a constant that is a node": (add_node("Constant", value_int=1), "operator 'Constant'"),
    "an overload": (first_node("overload", "x"), "an overload"),
    "an unknown attribute": (attribute_of_first(surprise=1), "surprise"),
    "an attribute that is no number": (attribute_of_first(epsilon=float("nan")), "nan"),
    "an attribute of text": (attribute_of_first(mode="x"), "a text"),
    "data outside the file": (external_data, "external_data|data_location"),
    "a sparse tensor": (sparse_tensor, "sparse_initializer"),
    "numbers that are not raw": (first_constant(float_data), "field 4"),
    "texts": (first_constant(text_data), "texts"),
    "dimensions of 2 to the 80": (first_constant(huge_dimensions), "by its dimensions"),
    "a long name": (first_node("name", "n" * 100_000), "a name has"),
    "another width": (dimension(1 << 20), "the input"),
    "an input too many": (
        lambda model: model.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
        "an input 'more'",
    ),
    "an output too few": (lambda model: model.graph.output.pop(), "no output"),
    "twenty thousand nodes": (
        lambda model: model.graph.node.extend([model.graph.node[0]] * 20_000),
        "over 10000 of node",
    ),
    "a thousand nodes too many": (lambda model: model.graph.node.extend([model.graph.node[0]] * 1000), "nodes"),
    "older operators": (lambda model: setattr(model.opset_import[0], "version", 1), "operators of"),
    "a domain too many": (lambda model: model.opset_import.append(helper.make_opsetid("evil", 1)), "opset_import"),
    "metadata": (lambda model: model.metadata_props.add(key="a", value="b"), "metadata_props"),
    "training": (lambda model: model.training_info.add(), "training_info"),
}
ATTENTION = {"lengths from the file": (lengths_from_constant, "is not '|lengths"), "more heads": (more_heads, "1024")}
BYTES = {
    "no bytes": (lambda content: b"", "cannot be loaded"),
    "text": (lambda content: b"this is no model", "cannot be loaded"),
    "half of it": (lambda content: content[: len(content) // 2], "claims"),
    "a length of 4 gibibytes": (lambda content: content + b"\x3a\xff\xff\xff\xff\x0f", "claims"),
    "a number that does not end": (lambda content: content + b"\x08" + b"\xff" * 11, "does not end"),
    "a group": (lambda content: content + b"\x0b\x0c", "wire type 3"),
    "two graphs": (lambda content: content + b"\x3a\x00", "over 1 of graph"),
    "an unknown field": (lambda content: content + b"\xf8\x07\x01", "field 127"),
}


def mutate_values(bundle, edit, file):
    path = bundle / MANIFEST_FILE
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def mutate_text(bundle, edit, file):
    path = bundle / MANIFEST_FILE
    before = path.read_bytes()
    path.write_bytes(edit(before))
    assert path.read_bytes() != before


def mutate_file(bundle, edit, file):
    edit(bundle / file)


def mutate_model(bundle, edit, file):
    model = onnx.ModelProto.FromString((bundle / file).read_bytes())
    edit(model)
    mutate_bytes(bundle, lambda content: model.SerializeToString(), file)


def mutate_bytes(bundle, edit, file):
    header = read_manifest(bundle).header
    (bundle / file).write_bytes(edit((bundle / file).read_bytes()))
    seal(bundle, header)


def table(mutate, mutations, files):
    return [
        pytest.param(mutate, edit, file, reason, id=f"{file}, {name}")
        for file in files
        for name, (edit, reason) in mutations.items()
    ]


def some(files):
    """A file by turns in the ordinary suite, all of them in the long form."""
    return files if SOAK else files[-2:-1]


CASES = [
    *table(mutate_values, VALUES, [MANIFEST_FILE]),
    *table(mutate_text, TEXTS, [MANIFEST_FILE]),
    *table(mutate_file, NOT_FILES, [*(CONTENT_FILES if SOAK else [SUBWORDS_FILE]), MANIFEST_FILE]),
    *table(mutate_file, CHANGED_FILES, CONTENT_FILES if SOAK else [SUBWORDS_FILE]),
    *table(mutate_model, MODELS, some([*GRAPHS[:-1], DECODER_FILE, GRAPHS[-1]])),
    *table(mutate_model, ATTENTION, GRAPHS if SOAK else [ENCODER_FILE, DECODER_FILE]),
    *table(mutate_bytes, BYTES, some([*GRAPHS[1:], REORDER_FILE, ENCODER_FILE, DECODER_FILE])),
]


def check(bundle):
    check_graphs(bundle, read_manifest(bundle))


@pytest.fixture(scope="module")
def service(tmp_path_factory, bundle_dir):
    """A service with one model; it imports what passes the check of its graphs, which needs no ONNX Runtime."""
    loader = OnnxBundleLoader(OnnxConfig(), SchedulerConfig())
    service = LoopbackService(tmp_path_factory.mktemp("service"), loader=loader, examine=check)
    service.models.import_bundle(bundle_dir, "good")
    yield service
    service.close()


@pytest.fixture
def bundle(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "bundle")


def listed(service):
    answer = service.model_stub.ListModels(model_pb2.ListModelsRequest(), timeout=30)
    return {model.name: list(model.versions) for model in answer.models}


@pytest.mark.parametrize(("mutate", "edit", "file", "reason"), CASES)
def test_mutated_bundle_is_refused_with_a_reason(service, bundle, mutate, edit, file, reason):
    mutate(bundle, edit, file)
    with pytest.raises(ModelDamaged, match=reason) as caught:
        service.models.import_bundle(bundle, "bad")
    assert caught.value.metadata["file"] == file
    assert len(caught.value.message) < 1000
    assert str(bundle) not in caught.value.message
    assert listed(service) == {"good": [1]}
    assert list(service.folder.imports.iterdir()) == []


def test_table_has_enough_mutations():
    assert len(CASES) >= (200 if SOAK else 40)


def wrong_product(model):
    """Transpose the largest matrix: shapes inside the graph do not fit, which only ONNX Runtime finds out."""
    oblong = [tensor for tensor in model.graph.initializer if len(set(tensor.dims)) == 2]
    tensor = max(oblong, key=lambda tensor: len(tensor.raw_data))
    tensor.dims[:] = [tensor.dims[1], tensor.dims[0]]


def memory_bomb(model):
    """Let a sum of two small constants, which ONNX Runtime would compute when it loads, have 160 GB."""
    for name, shape in (("tall", (200_000, 1)), ("wide", (1, 200_000))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node.append(helper.make_node("Add", ["tall", "wide"], ["bomb"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["bomb"], ["spark"], keepdims=0))
    for node in model.graph.node:
        if node.op_type == "LogSoftmax":
            sum_node = helper.make_node("Add", [node.input[0], "spark"], ["armed"])
            node.input[0] = "armed"
            break
    model.graph.node.insert(0, model.graph.node.pop())
    model.graph.node.insert(0, model.graph.node.pop())
    model.graph.node.insert(list(model.graph.node).index(node), sum_node)


def pickled(content):
    described = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(118)
    return b"\x93NUMPY\x01\x00" + len(described).to_bytes(2, "little") + described + b"cos\nsystem\n"


@pytest.mark.parametrize(
    ("mutate", "edit", "file"),
    [
        (mutate_model, wrong_product, ENCODER_FILE),
        (mutate_model, memory_bomb, DECODER_FILE),
        (mutate_bytes, lambda content: b"no subwords", SUBWORDS_FILE),
        (mutate_bytes, pickled, EMBEDDING_FILE),
        (mutate_bytes, lambda content: content[:-4], EMBEDDING_FILE),
    ],
    ids=["shapes that do not fit", "a memory bomb", "no subwords", "a pickle", "a short embedding"],
)
def test_first_load_in_another_process_refuses_the_rest(bundle, mutate, edit, file):
    mutate(bundle, edit, file)
    check(bundle)
    with pytest.raises(ModelDamaged, match=r"cannot be (loaded|translated)|SIG"):
        examine_bundle(bundle)


def test_good_bundle_passes_its_first_load(bundle_dir):
    examine_bundle(bundle_dir)


def test_first_load_is_limited_in_memory_and_time(bundle_dir):
    limits = TrialLimits.for_bundle(read_manifest(bundle_dir))
    with pytest.raises(ModelDamaged, match="processor time"):
        try_to_load(bundle_dir, dataclasses.replace(limits, cpu_s=0))
    with pytest.raises(ModelDamaged, match=r"MiB of memory|SIG"):
        try_to_load(bundle_dir, dataclasses.replace(limits, memory_bytes=8 << 20))


@pytest.mark.parametrize(
    "make",
    [lambda path: path.write_text("[]"), os.mkfifo, lambda path: path.symlink_to("/dev/zero")],
    ids=["another type", "a pipe", "a link to a device"],
)
def test_service_lists_models_beside_a_published_manifest_that_is_damaged(service, bundle_dir, make):
    version = service.models.import_bundle(bundle_dir, "damaged")
    path = service.models.bundle_dir(version) / MANIFEST_FILE
    path.unlink()
    make(path)
    for call in (
        lambda: service.model_stub.LoadModel(model_pb2.LoadModelRequest(model=version.reference), timeout=30),
        lambda: list(service.model_stub.DownloadModel(model_pb2.DownloadModelRequest(model=version.reference))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert MANIFEST_FILE in rpc_status.from_call(caught.value).message
    assert set(listed(service)) == {"good", "damaged"}
    service.models.delete_version(version.name, version.version)
    assert set(listed(service)) == {"good"}


@pytest.mark.skipif(not SOAK, reason="the long form: FERRYMAN_SOAK=1")
@pytest.mark.parametrize("seed", range(60))
def test_random_mutations_are_refused_or_harmless(bundle, seed):
    """Whatever bytes change, the bundle is damaged or can be translated with; nothing else happens."""
    generator = random.Random(seed)
    file = generator.choice([*GRAPHS, REORDER_FILE, SUBWORDS_FILE, EMBEDDING_FILE])
    header = read_manifest(bundle).header
    content = bytearray((bundle / file).read_bytes())
    for _ in range(generator.choice([1, 4, 64])):
        place = generator.randrange(len(content))
        content[place : place + generator.choice([0, 1, 1, 8])] = generator.randbytes(generator.choice([0, 1, 1, 8]))
    (bundle / file).write_bytes(content)
    seal(bundle, header)
    with contextlib.suppress(ModelDamaged):
        examine_bundle(bundle)
