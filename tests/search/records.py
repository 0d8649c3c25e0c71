"""Records for tests: members of a front with distinct architectures."""

from search.engine.choice import BoundedLimit, Prediction
from search.engine.front import Member
from search.engine.verification import LimitResult
from space import Architecture, Layer


def make_member(number: int, loss: float = 1.0) -> Member:
    """A member whose architecture depends on a number."""
    layer = Layer(mixer="attention", heads=1, kv_heads=1, ffn=number + 1)
    predicted = Prediction(params=number, latency={"desk": {}})
    qualities = {"loss": loss, "recall_loss": None}
    return Member(architecture=Architecture(16, (layer,)), qualities=qualities, predicted=predicted)


def limit_result(text: str, bound: float, found: float | None) -> LimitResult:
    """A limit with its measured value."""
    return LimitResult(bounded=BoundedLimit(text=text, bound=bound, unit=""), found=found)
