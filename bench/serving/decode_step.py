"""`make bench-decode-step`: the time of a decoder step in ONNX Runtime, by form of graph and number of rows, and of
matrix products of its sizes, by operator.

Nothing has a target: these are the measurements that the choice of operators rests on. One thread, bound buffers,
random weights, caches of ten positions."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from bench.serving.decode_graphs import (
    SIZES,
    CrossAttention,
    Head,
    SelfAttention,
    Sizes,
    StepBatch,
    StepGraph,
    Variant,
    parse_variant,
    step_inputs,
)
from bench.serving.matmul_forms import FORMS, Form, product_graph, product_input
from bench.shared.result import Result, publish, watched_machine

BATCHES: Final = (
    StepBatch(sentences=1, width=1),
    StepBatch(sentences=1, width=5),
    StepBatch(sentences=64, width=1),
    StepBatch(sentences=32, width=5),
    StepBatch(sentences=64, width=5),
)
VARIANTS: Final = (
    *(Variant(self_attention=kind) for kind in SelfAttention),
    Variant(self_attention=SelfAttention.GQA, cross_attention=CrossAttention.MHA),
    Variant(self_attention=SelfAttention.GQA, cross_attention=CrossAttention.A24),
    *(Variant(self_attention=SelfAttention.GQA, head=head) for head in Head if head is not Head.LOGSOFTMAX),
)
PRODUCT_ROWS: Final = (1, 5, 64, 160, 320)
_WARM_UP_RUNS: Final = 3
_LEAST_RUNS: Final = 5


def median_ms(run: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, after some that do not count, milliseconds."""
    for _ in range(_WARM_UP_RUNS):
        run()
    taken_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(taken_s) < _LEAST_RUNS:
        begin_s = time.perf_counter()
        run()
        taken_s.append(time.perf_counter() - begin_s)
    return 1000 * statistics.median(taken_s)


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session with one thread; raises ONNX Runtime's errors."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # a form that does not run is reported, not logged
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],  # on a CPU the fused node takes longer than its parts
    )


def step_ms(
    session: onnxruntime.InferenceSession, sizes: Sizes, variant: Variant, batch: StepBatch, seconds: float
) -> float:
    """Return the milliseconds of a step. Caches are written in place, by every form that does not make new ones."""
    binding, inputs = session.io_binding(), step_inputs(sizes, variant, batch)
    in_place = variant.self_attention is not SelfAttention.CONCAT
    values = {
        node.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs[node.name]))
        for node in session.get_inputs()
    }
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for node in session.get_outputs():
        if in_place and node.name.startswith("present_"):
            binding.bind_ortvalue_output(node.name, values[node.name.replace("present_", "past_")])
        else:
            binding.bind_output(node.name, "cpu")
    return median_ms(lambda: session.run_with_iobinding(binding), seconds)


def measure_steps(preset: str, variants: Sequence[Variant], seconds: float) -> dict[str, Any]:
    """Return the milliseconds of a step by variant and rows; what ONNX Runtime refuses is an error's text."""
    print(f"\n{preset}: ms a step{'':22}" + "".join(f"{batch.rows:>9}" for batch in BATCHES) + " rows")
    found: dict[str, Any] = {}
    for variant in variants:
        try:
            session = session_of(StepGraph(SIZES[preset], variant).build())
            taken = {str(b.rows): round(step_ms(session, SIZES[preset], variant, b, seconds), 4) for b in BATCHES}
        except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no base class of their own)
            found[str(variant)] = {"error": str(error)[:200]}
            print(f"{variant!s:36} {str(error)[:80]}", flush=True)
            continue
        found[str(variant)] = taken
        print(f"{variant!s:36}" + "".join(f"{value:9.3f}" for value in taken.values()), flush=True)
    return found


def product_sizes(sizes: Sizes) -> list[tuple[int, int]]:
    """Return the widths, in and out, of a step's products: joint query, key and value; inner, outer; head."""
    d_model, ffn_dim = sizes.d_model, sizes.ffn_dim
    return [(d_model, 3 * d_model), (d_model, ffn_dim), (ffn_dim, d_model), (d_model, sizes.vocabulary)]


def measure_products(preset: str, forms: Mapping[str, Form], seconds: float) -> dict[str, Any]:
    """Return the microseconds of a product by widths, form and rows."""
    found: dict[str, Any] = {}
    for width_in, width_out in product_sizes(SIZES[preset]):
        label = f"{width_in} x {width_out}"
        print(f"\n{label:36}" + "".join(f"{rows:>9}" for rows in PRODUCT_ROWS) + " rows, us")
        found[label] = {}
        for name, form in forms.items():
            session = session_of(product_graph(form, width_in, width_out))
            taken = {str(rows): _product_us(session, form, rows, width_in, seconds) for rows in PRODUCT_ROWS}
            found[label][name] = taken
            print(f"{name:36}" + "".join(f"{value:9.1f}" for value in taken.values()), flush=True)
    return found


def _product_us(session: onnxruntime.InferenceSession, form: Form, rows: int, width_in: int, seconds: float) -> float:
    binding = session.io_binding()
    binding.bind_cpu_input("x", product_input(form, rows, width_in))
    binding.bind_output("y")
    return round(1000 * median_ms(lambda: session.run_with_iobinding(binding), seconds), 1)


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark."""
    seconds = arguments.seconds
    steps = {preset: measure_steps(preset, arguments.variants, seconds) for preset in arguments.presets}
    products = {preset: measure_products(preset, FORMS, seconds) for preset in arguments.presets}
    return Result(
        bench="decode-step",
        value=float(len(arguments.variants)),
        target=None,
        peer=None,
        details={"unit": "variants measured", "step_ms": steps, "product_us": products},
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-decode-step", description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument(
        "--variants",
        nargs="+",
        type=parse_variant,
        default=list(VARIANTS),
        help="such as gqa/plain/logsoftmax (default: those that were chosen from)",
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number (default: 0.5)")
    return parser.parse_args(argv)


@watched_machine()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; there is nothing to reach."""
    return publish(measure(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
