"""Limits: what may be written, what is refused and with which words, and quantities for people."""

import pytest

from search.problem.limit import Limit, check_no_duplicates
from search.problem.metric import format_quantity
from space import InputError, Workload

GOOD = [
    # text, canonical, device, metric, workload, bound, relative
    ("decode@2048<=2ms", "decode@2048<=2ms", None, "decode", ("decode", 2048, 1, 1), 2e-3, False),
    (" prefill@512 <= 60 % ", "prefill@512<=60%", None, "prefill", ("prefill", 512, 1, 1), 60, True),
    ("prefill@512<=100%", "prefill@512<=100%", None, "prefill", ("prefill", 512, 1, 1), 100, True),
    (
        "phone-2:decode@7<=.5us",
        "phone-2:decode@7<=0.5us",
        "phone-2",
        "decode",
        ("decode", 7, 1, 1),
        5e-7,
        False,
    ),
    ("decode@7<=90ns", "decode@7<=90ns", None, "decode", ("decode", 7, 1, 1), 9e-8, False),
    ("a.b_c:prefill@9<=1e1s", "a.b_c:prefill@9<=10s", "a.b_c", "prefill", ("prefill", 9, 1, 1), 10, False),
    (
        "decode@64, threads=4 , batch=2, precision=fp32 <= 2.50 ms",
        "decode@64,batch=2,threads=4<=2.5ms",
        None,
        "decode",
        ("decode", 64, 2, 4),
        2.5e-3,
        False,
    ),
    ("decode@064,batch=1<=2ms", "decode@64<=2ms", None, "decode", ("decode", 64, 1, 1), 2e-3, False),
    ("memory@2048<=64MiB", "memory@2048<=64MiB", None, "memory", ("prefill", 2048, 1, 1), 64 * 2**20, False),
    ("memory@8,batch=3<=1GB", "memory@8,batch=3<=1GB", None, "memory", ("prefill", 8, 3, 1), 1e9, False),
    ("memory@8<=5KB", "memory@8<=5KB", None, "memory", ("prefill", 8, 1, 1), 5000, False),
    ("memory@8<=5KiB", "memory@8<=5KiB", None, "memory", ("prefill", 8, 1, 1), 5120, False),
    ("memory@8<=5B", "memory@8<=5B", None, "memory", ("prefill", 8, 1, 1), 5, False),
    ("rss@2048<=64MiB", "rss@2048<=64MiB", None, "rss", ("prefill", 2048, 1, 1), 64 * 2**20, False),
    (
        "phone:rss@64,threads=2<=60%",
        "phone:rss@64,threads=2<=60%",
        "phone",
        "rss",
        ("prefill", 64, 1, 2),
        60,
        True,
    ),
    ("params<=5M", "params<=5M", None, "params", None, 5e6, False),
    ("params <= 1.5B", "params<=1.5B", None, "params", None, 1.5e9, False),
    ("params<=7e3K", "params<=7000K", None, "params", None, 7e6, False),
    ("params<=123456", "params<=123456", None, "params", None, 123456, False),
    ("phone:params<=12.5%", "phone:params<=12.5%", "phone", "params", None, 12.5, True),
]

BAD = [
    ("", "no '<=' is given; expected METRIC<=VALUE, such as decode@2048<=2ms"),
    ("decode@64", "no '<=' is given"),
    ("params=5M", "no '<=' is given"),
    ("decode@64<2ms", "'<' is not allowed; expected METRIC<=VALUE"),
    ("decode@64>=2ms", "'>=' is not allowed"),
    ("decode@64==2ms", "'==' is not allowed"),
    ("params=<5M", "'=<' is not allowed"),
    ("params≤5M", "'≤' is not allowed"),
    ("<=5M", "metric '' is not one of prefill@N, decode@N, memory@N, rss@N, params"),
    ("latency@64<=2ms", "metric 'latency' is not one of prefill@N, decode@N, memory@N, rss@N, params"),
    ("Decode@64<=2ms", "metric 'Decode' is not one of"),
    ("rss<=64MiB", "rss needs a number of tokens"),
    ("rss@64<=60ms", "unit 'ms' is not known; for rss it is one of B, KB"),
    ("rss@64,precision=int3<=60%", "precision 'int3' is not one of"),
    (":params<=5M", "'' is not a device name"),
    ("a:b:params<=5M", "'a:b' is not a device name"),
    ("my phone:params<=5M", "'my phone' is not a device name; one has letters"),
    ("params@64<=5M", "params is the same for every workload; leave out '@64'"),
    ("params,batch=2<=5M", "leave out ',batch=2'"),
    ("decode<=2ms", "decode needs a number of tokens; expected decode@N, such as decode@512"),
    ("decode@<=2ms", "'' is not a number of tokens"),
    ("decode@0<=2ms", "'0' is not a number of tokens"),
    ("decode@-4<=2ms", "'-4' is not a number of tokens"),
    ("memory@2k<=2MB", "'2k' is not a number of tokens; expected memory@N"),
    ("decode@٣<=2ms", "'٣' is not a number of tokens"),
    (f"decode@{'9' * 5000}<=2ms", "is not a number of tokens"),
    ("decode@64,batch=0<=2ms", "batch '0' is not a whole number above 0"),
    ("decode@64,threads=two<=2ms", "threads 'two' is not a whole number above 0"),
    ("decode@64,batch<=2ms", "batch '' is not a whole number above 0"),
    ("decode@64,batch=2,batch=3<=2ms", "batch is given twice"),
    ("decode@64,precision=int4<=2ms", "precision 'int4' is not one of fp32"),
    (
        "decode@64,cores=2<=2ms",
        "'cores=2' is not understood; decode@N takes batch, threads, precision",
    ),
    ("memory@64,threads=2<=2MB", "'threads=2' is not understood; memory@N takes batch, precision"),
    ("decode@64,<=2ms", "'' is not understood"),
    ("decode@64<=", "'' is not a value; expected a number and a unit (ns, us, ms, s, or % of the largest)"),
    ("decode@64<=fast", "'fast' is not a value"),
    ("params<=1,000", "unit ',000' is not known"),
    ("params<=1_000", "unit '_000' is not known"),
    ("decode@64<==2ms", "'=2ms' is not a value"),
    ("decode@64<=2", "the unit is missing; for decode it is one of ns, us, ms, s, or % of the largest"),
    ("decode@64<=2MS", "unit 'MS' is not known"),
    ("decode@64<=2MiB", "unit 'MiB' is not known; for decode it is one of ns, us, ms, s"),
    ("memory@64<=2ms", "unit 'ms' is not known; for memory it is one of B, KB, KiB, MB, MiB, GB, GiB"),
    ("params<=2m", "unit 'm' is not known; for params it is one of K, M, B or nothing, or % of the largest"),
    ("decode@64<=0ms", "'0ms' is not above 0 and finite"),
    ("decode@64<=-2ms", "'-2ms' is not above 0 and finite"),
    ("params<=inf", "'inf' is not above 0 and finite"),
    ("params<=nan", "'nan' is not above 0 and finite"),
    ("params<=1e999", "'1e999' is not above 0 and finite"),
    ("params<=1e308B", "'1e308B' is not above 0 and finite"),
    ("params<=0%", "'0%' is not above 0"),
    ("params<=101%", "above 100% of the largest architecture is no limit: '101%'"),
    ("params<=60%%", "unit '%%' is not known"),
]


@pytest.mark.parametrize(("text", "canonical", "device", "metric", "workload", "bound", "relative"), GOOD)
def test_limit_is_read_as_written(
    text: str,
    canonical: str,
    device: str | None,
    metric: str,
    workload: tuple[str, int, int, int] | None,
    bound: float,
    relative: bool,
) -> None:
    limit = Limit.parse(text)
    assert (limit.device, limit.metric.name, limit.relative, limit.text) == (
        device,
        metric,
        relative,
        canonical,
    )
    assert limit.bound == pytest.approx(bound, rel=1e-12)
    if workload is None:
        assert limit.workload is None
    else:
        phase, length, batch, threads = workload
        assert limit.workload == Workload(phase=phase, length=length, batch=batch, threads=threads)
    assert Limit.parse(limit.text) == limit
    assert limit.text.startswith(f"{limit.subject}<=")


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:30] for text, _ in BAD])
def test_malformed_limit_is_refused_with_the_expected_form(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Limit.parse(text)
    assert message in str(error.value)
    assert str(error.value).startswith("limit '")
    assert "\n" not in str(error.value)


def test_percentage_is_of_the_reference() -> None:
    assert Limit.parse("decode@64<=25%").resolve(8e-3) == pytest.approx(2e-3, rel=1e-12)
    assert Limit.parse("decode@64<=2ms").resolve(8e-3) == 2e-3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("decode@64<=2ms", "decode@64,batch=1<=60%"),
        ("a:params<=2M", "a:params<=3M"),
        ("memory@8<=2MB", "memory@8<=2MB"),
    ],
)
def test_two_limits_on_one_quantity_are_refused(first: str, second: str) -> None:
    limits = [Limit.parse(text) for text in (first, "decode@1<=1s", second)]
    with pytest.raises(InputError, match="keep one") as error:
        check_no_duplicates(limits)
    assert repr(limits[0].text) in str(error.value)
    assert repr(limits[2].text) in str(error.value)


def test_limit_without_a_device_is_on_the_first_one() -> None:
    limits = [Limit.parse(text) for text in ("decode@256<=2ms", "here:decode@256<=3ms")]
    for first in (None, "phone"):
        check_no_duplicates(limits, first)
    with pytest.raises(
        InputError, match=r"'decode@256<=2ms' and 'here:decode@256<=3ms': both limit .*keep one"
    ):
        check_no_duplicates(limits, "here")


def test_limits_on_different_quantities_are_accepted() -> None:
    texts: tuple[str, ...] = (
        "decode@64<=2ms",
        "a:decode@64<=2ms",
        "b:decode@64<=2ms",
        "decode@65<=2ms",
        "prefill@64<=2ms",
    )
    texts += (
        "decode@64,batch=2<=2ms",
        "decode@64,threads=2<=2ms",
        "memory@64<=2MB",
        "params<=1M",
        "a:params<=1M",
    )
    check_no_duplicates([Limit.parse(text) for text in texts])


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("decode", 3.21e-3, "3.21 ms"),
        ("decode", 1e-3, "1 ms"),
        ("decode", 9.996e-4, "1 ms"),
        ("prefill", 12.345, "12.3 s"),
        ("prefill", 4.567e-5, "45.7 us"),
        ("prefill", 3e-10, "0.3 ns"),
        ("memory", 5.1 * 2**20, "5.1 MiB"),
        ("memory", 1000, "1000 B"),
        ("memory", 1023.9 * 2**10, "1 MiB"),
        ("memory", 0, "0 B"),
        ("memory", 3 * 2**30, "3 GiB"),
        ("params", 1_200_000, "1.2M parameters"),
        ("params", 950, "950 parameters"),
        ("params", 999_999, "1M parameters"),
        ("params", 61_728, "61.7K parameters"),
    ],
)
def test_quantities_are_printed_in_readable_units(metric: str, value: float, text: str) -> None:
    assert format_quantity(metric, value) == text
