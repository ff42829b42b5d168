"""What the graph of autograd shows: whether it is piecewise linear in each weight, whether a weight is used twice."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hap import HapError

PIECEWISE_LINEAR = frozenset(
    "AccumulateGrad T Transpose Permute View ReshapeAlias UnsafeView Relu Hardtanh LeakyRelu PreluKernel Threshold "
    "Abs Clamp ClampMin ClampMax Maximum Minimum Amax MaxPool2DWithIndices MaxPool1D AvgPool2D AdaptiveAvgPool2D "
    "AdaptiveMaxPool2D Mean Add Sub Sum Neg Cat Stack Slice Select Split SplitWithSizes Unbind Squeeze Unsqueeze Clone "
    "ConstantPadNd NativeBatchNorm CudnnBatchNorm IndexSelect Index Gather Scatter AsStrided Expand PixelShuffle "
    "PixelUnshuffle UpsampleNearest2D UpsampleBilinear2D Alias ToCopy".split()
)
# linear while at most one factor is not a parameter
BILINEAR = frozenset({"Convolution", "Addmm", "Mm", "Mul", "Div", "Bmm", "Addcmul"})


def piecewise_linear(outputs: Tensor) -> bool:
    """Whether the graph behind `outputs` has only ops that are piecewise linear in each single weight."""
    return all(_straight(node) for node in _graph(outputs))


def _straight(node: Node) -> bool:
    if isinstance(node, BackwardCFunction) or getattr(node, "_saved_training", False):
        return False  # a custom function, whatever its name; or BatchNorm with the statistics of the batch
    op = node.name().rstrip("0123456789").removesuffix("Backward").rpartition("::")[2]
    curved = [f for f, _ in node.next_functions if f is not None and not _is_parameter(f)]
    divided_by = node.next_functions[1][0] if op == "Div" else None
    return op in PIECEWISE_LINEAR or (op in BILINEAR and len(curved) <= 1 and divided_by not in curved)


def _graph(outputs: Tensor) -> Iterator[Node]:
    """All nodes of the graph behind `outputs`, without repeats."""
    stack, known = [outputs.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def sources(outputs: Tensor, nodes: Iterable[Node]) -> list[Node]:
    """The nodes from which none of the others is reached: a backward pass that ends at them passes all."""
    wanted, reaches, stack = set(nodes), dict[Node, bool](), list(filter(None, [outputs.grad_fn]))
    while stack:
        node = stack[-1]
        following = [f for f, _ in node.next_functions if f is not None]
        ahead = [f for f in following if f not in reaches]
        if not ahead:
            reaches[node] = any(f in wanted or reaches[f] for f in following)
            stack.pop()
        stack += ahead
    return [node for node in wanted if reaches.get(node) is False]


def refuse_shared(outputs: Tensor, params: Mapping[str, Tensor]) -> None:
    """HapError where the graph uses a parameter twice: the square of a sum is not the sum of squares."""
    names = {parameter: name for name, parameter in params.items()}
    used = Counter(getattr(f, "variable", None) for node in _graph(outputs) for f, _ in node.next_functions)
    for parameter, name in names.items():
        if used[parameter] > 1:
            layer, _, own = name.rpartition(".")
            raise HapError(f"curvature: the {own} of {layer} is used {used[parameter]} times in one pass, not once")


def _is_parameter(node: Node) -> bool:
    """Whether the node is a parameter, or a view of one."""
    while len(node.next_functions) == 1 and (following := node.next_functions[0][0]) is not None:
        node = following
    return "AccumulateGrad" in node.name()
