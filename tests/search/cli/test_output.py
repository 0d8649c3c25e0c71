"""Tables of a run's result."""

from dataclasses import replace

from search.cli.app import summary_tables
from search.engine.verification import Parity
from search.report.summary import Summary, TextQuality, VerifiedMember
from tests.search.cli.test_progress import member


def test_unknown_bits_per_byte_are_shown_as_a_dash() -> None:
    text = TextQuality(
        source="text",
        held_out_bytes=None,
        recall_share=0.0,
        largest_bits_per_byte=2.0,
        largest_recall_loss_nats=None,
        largest_mqar_accuracy=None,
        chosen_bits_per_byte=None,
        gzip_bits_per_byte=None,
        order2_bits_per_byte=None,
    )
    parity = Parity(errors={"onnx": 1e-7}, bound=1e-5, tokens=8)
    chosen = VerifiedMember(member=member(256), latency={}, limits=(), parity=parity)
    summary = Summary(
        space="tiny",
        architectures=2,
        device="laptop",
        fingerprint={},
        text=text,
        predictor={},
        front=(member(256), member(512)),
        rounds=1,
        chosen=chosen,
        verified={"fastest": chosen},
        inputs={},
    )
    bits = [[str(cell) for cell in column.cells] for column in summary_tables(summary)[-1].columns]
    assert bits == [["2.000"], ["-"], ["-"], ["-"]]
    known = replace(summary, text=replace(text, gzip_bits_per_byte=3.0))
    assert [str(cell) for cell in summary_tables(known)[-1].columns[-1].cells] == ["3.000"]
