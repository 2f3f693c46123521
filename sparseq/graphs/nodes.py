"""Writing one ONNX graph, node by node, with the large weights in a file that several graphs share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Operators of ONNX Runtime that the ONNX standard lacks, or that run faster than the standard's.
MICROSOFT = "com.microsoft"
_OPSETS = {"": 23, MICROSOFT: 1}
_IR_VERSION = 11

# Tensors of fewer bytes travel in the graph itself.
_SMALL = 1024
# Where a tensor may begin in the file: ONNX Runtime maps it into memory, which is done in pages.
_ALIGNMENT = 4096


class WeightFile:
    """The large tensors of several graphs in one file, each stored once under its name.

    Args:
        path: The file to write; the graphs must lie beside it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] = path.open("wb")
        self._stored: dict[str, TensorProto] = {}

    def store(self, name: str, array: np.ndarray) -> None:
        """Write a tensor, unless there is one of that name."""
        if name not in self._stored:
            self._stored[name] = self._write(name, np.ascontiguousarray(array))

    def tensor(self, name: str) -> TensorProto:
        """What a graph says of a stored tensor."""
        return self._stored[name]

    def has(self, name: str) -> bool:
        """Whether a tensor of that name is stored."""
        return name in self._stored

    def close(self) -> None:
        self._file.close()

    def _write(self, name: str, array: np.ndarray) -> TensorProto:
        if array.nbytes < _SMALL:
            return numpy_helper.from_array(array, name)
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        place = {"location": self.path.name, "offset": self._file.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self._file)
        return tensor


class Graph:
    """One graph in the making. Methods that add a node return the names of its outputs.

    Args:
        name: The graph's name.
        weights: Where its large tensors go.
    """

    def __init__(self, name: str, weights: WeightFile):
        self.name = name
        self.inputs: dict[str, tuple[str, list[str | int]]] = {}
        self.outputs: dict[str, tuple[str, list[str | int]]] = {}
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._renamed: dict[str, str] = {}
        self._initializers: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: str, shape: list[str | int]) -> str:
        """Declare an input of a numpy type; a string in the shape is a length known only when the graph runs."""
        self.inputs[name] = (dtype, shape)
        return name

    def output(self, value: str, name: str, dtype: str, shape: list[str | int]) -> None:
        """Give a value out under a name."""
        self.outputs[name] = (dtype, shape)
        # The value itself gets the name: a node between them would copy it.
        self._renamed[value] = name

    def weight(self, name: str, array: np.ndarray) -> str:
        """A tensor that other graphs may share, under a name of its own."""
        return self.weights([name], lambda: [array])[0]

    def weights(self, names: Sequence[str], make: Callable[[], Sequence[np.ndarray]]) -> Sequence[str]:
        """Tensors that other graphs may share, made if no graph has asked for them yet."""
        if not all(map(self._weights.has, names)):
            for name, array in zip(names, make(), strict=True):
                self._weights.store(name, array)
        for name in names:
            self._initializers[name] = self._weights.tensor(name)
        return names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small tensor that belongs to this graph."""
        array = np.asarray(values, dtype=dtype)
        name = f"const_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if len(name) > 100:
            name = f"const_{len(self._initializers)}"
        self._initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its only output; an empty name stands for an input left out."""
        return self.node_of_many(operator, *inputs, outputs=1, domain=domain, **attributes)[0]

    def node_of_many(
        self, operator: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node and return the names of its outputs."""
        number = len(self._nodes)
        names = [f"{operator}_{number}_{index}" for index in range(outputs)]
        node = helper.make_node(operator, inputs, names, name=f"{operator}_{number}", domain=domain, **attributes)
        self._nodes.append(node)
        return names

    def model(self) -> onnx.ModelProto:
        """The graph as a model, whose large tensors refer to the file of weights."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value(name, *kind) for name, kind in self.inputs.items()],
            [_value(name, *kind) for name, kind in self.outputs.items()],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="sparseq")


def _value(name: str, dtype: str, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
