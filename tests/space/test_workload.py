from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from space import InputError, Workload
from tests.contracts import attempt

COUNTS = st.integers(1, 10**6)


@pytest.mark.parametrize(
    ("text", "workload"),
    [
        ("prefill@512", Workload(phase="prefill", length=512)),
        ("decode@1", Workload(phase="decode", length=1)),
        (" decode@2048 , batch=4 ", Workload(phase="decode", length=2048, batch=4)),
        ("prefill@8,threads=2,batch=3", Workload(phase="prefill", length=8, batch=3, threads=2)),
        ("prefill@8,precision=fp32", Workload(phase="prefill", length=8)),
        ("decode@8,precision=int8", Workload(phase="decode", length=8, precision="int8")),
    ],
)
def test_parse(text: str, workload: Workload) -> None:
    assert Workload.parse(text) == workload


@given(
    st.builds(
        Workload, phase=st.sampled_from(["prefill", "decode"]), length=COUNTS, batch=COUNTS, threads=COUNTS
    )
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_text_round_trip(workload: Workload) -> None:
    assert Workload.parse(str(workload)) == workload


def test_text_omits_defaults() -> None:
    assert str(Workload(phase="decode", length=9)) == "decode@9"
    assert str(Workload(phase="decode", length=9, batch=2, threads=3)) == "decode@9,batch=2,threads=3"


def test_tokens_and_past() -> None:
    """Decoding at a context of 5 reads the fifth token, with four in the state."""
    prefill, decode = (
        Workload(phase="prefill", length=5, batch=7),
        Workload(phase="decode", length=5, batch=7),
    )
    assert (prefill.past, prefill.tokens) == (0, 5)
    assert (decode.past, decode.tokens) == (4, 1)
    assert prefill.past + prefill.tokens == decode.past + decode.tokens == 5


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@0", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@-4", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@4.5", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@4k", "expected prefill@TOKENS or decode@CONTEXT"),
        ("train@4", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@4@5", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@" + "9" * 5000, "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@\N{ARABIC-INDIC DIGIT FOUR}", "expected prefill@TOKENS or decode@CONTEXT"),
        ("prefill@4,", "'' is not understood"),
        ("prefill@4,batch", "'batch' is not understood"),
        ("prefill@4,batch=0", "'batch=0' is not understood"),
        ("prefill@4,batch=-1", "'batch=-1' is not understood"),
        ("prefill@4,batch=\N{SUPERSCRIPT TWO}", "is not understood"),
        ("prefill@4,batch=" + "9" * 5000, "is not understood"),
        ("prefill@4,bach=2", "'bach=2' is not understood"),
        ("prefill@4,batch=2,batch=3", "batch is given twice"),
        ("prefill@4,precision=int4", "precision 'int4' is not one of fp32, int8, int8-dynamic"),
        ("prefill@4,batch=2\nthreads=2", "is not understood"),
    ],
)
def test_invalid_text_is_one_line_error(text: str, fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        Workload.parse(text)
    message = str(caught.value)
    assert message.startswith(f"workload {text!r}: ")
    assert fragment in message
    assert len(message.splitlines()) == 1


@given(st.text(alphabet="prefildco@0123456789,=batchs \n\N{FULLWIDTH DIGIT ONE}", max_size=24))
@settings(max_examples=300, derandomize=True, deadline=None)
def test_any_text_is_parsed_or_one_line_error(text: str) -> None:
    for whole in (text, f"prefill@4,{text}", f"decode@{text}"):
        workload, message = attempt(partial(Workload.parse, whole))
        if workload is None:
            assert len(message.splitlines()) == 1
        else:
            assert Workload.parse(str(workload)) == workload
            assert min(workload.length, workload.batch, workload.threads) > 0
