"""The step's variants: all that this ONNX Runtime runs compute the same."""

import numpy as np
import pytest

from bench.serving.decode_graphs import (
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
from bench.serving.decode_step import PRODUCT_ROWS, median_ms, session_of, step_ms
from bench.serving.matmul_forms import FORMS, product_graph, product_input

SIZES = Sizes(d_model=32, ffn_dim=48, heads=2, layers=2, vocabulary=50)
ALONE = StepBatch(sentences=3, width=1)


def outputs(variant, batch):
    """Run a step whose caches, where they are written in place, are bound to what is read."""
    session = session_of(StepGraph(SIZES, variant).build())
    arrays = step_inputs(SIZES, variant, batch)
    return dict(
        zip(
            [node.name for node in session.get_outputs()],
            session.run(None, {node.name: arrays[node.name] for node in session.get_inputs()}),
            strict=True,
        )
    )


def test_variant_text_names_its_parts():
    assert parse_variant("gqa") == Variant(self_attention=SelfAttention.GQA)
    mixed = parse_variant("tree/mha/topk")
    assert mixed == Variant(self_attention=SelfAttention.TREE, cross_attention=CrossAttention.MHA, head=Head.TOPK)
    assert parse_variant(str(mixed)) == mixed
    with pytest.raises(ValueError, match="at most 3"):
        parse_variant("gqa/plain/topk/more")
    with pytest.raises(ValueError, match="gqb"):
        parse_variant("gqb")


@pytest.mark.parametrize("head", [Head.LSE, Head.LOGSOFTMAX])
def test_both_ways_to_log_probabilities_agree(head):
    everything = outputs(Variant(self_attention=SelfAttention.GQA, head=Head.ALL), ALONE)["best"]
    wanted = everything - np.log(np.exp(everything).sum(-1, keepdims=True))
    found = outputs(Variant(self_attention=SelfAttention.GQA, head=head), ALONE)
    np.testing.assert_array_equal(found["tokens"][:, 0], wanted.argmax(-1))
    np.testing.assert_allclose(found["best"][:, 0], wanted.max(-1), rtol=1e-4, atol=1e-4)


def test_head_does_not_change_choice():
    tokens = [
        outputs(Variant(self_attention=SelfAttention.GQA, head=head), ALONE)["tokens"][:, 0]
        for head in (Head.LOGSOFTMAX, Head.TOPK, Head.ARGMAX)
    ]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[0], tokens[2])


@pytest.mark.parametrize("kind", list(SelfAttention))
@pytest.mark.parametrize("batch", [ALONE, StepBatch(sentences=2, width=3)])
def test_every_self_attention_runs(kind, batch):
    assert (
        step_ms(
            session_of(StepGraph(SIZES, Variant(self_attention=kind)).build()),
            SIZES,
            Variant(self_attention=kind),
            batch,
            seconds=0.0,
        )
        > 0
    )


def test_time_is_median_of_several_runs():
    runs = []
    assert median_ms(lambda: runs.append(1), seconds=0.0) >= 0
    assert len(runs) >= 8


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_of_product_is_equal(name):
    form, (width_in, width_out) = FORMS[name], (128, 24)
    session = session_of(product_graph(form, width_in, width_out))
    x_MK = product_input(form, 5, width_in)
    (found_MN,) = session.run(None, {"x": x_MK})
    reference = session_of(product_graph(FORMS["MatMul float32"], width_in, width_out))
    as_float = x_MK.astype(np.float32) - (128 if x_MK.dtype == np.uint8 else 0)
    (wanted_MN,) = reference.run(None, {"x": as_float})
    correlation = np.corrcoef(found_MN.ravel().astype(np.float64), wanted_MN.ravel())[0, 1]
    assert correlation > 0.98
    assert min(PRODUCT_ROWS) == 1
