"""What the layers that multiply by a packed weight share: a bias, and what becomes of the activations."""

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from .input_range import check_input_quantizer
from .packed import PackedLayer, PackedWeight

ACTIVATIONS = ("float", "dynamic", "static")


class PackedProduct(PackedLayer):
    """A packed layer that multiplies its input by the weight.

    bias: a parameter in its own dtype, or None. activations: "float" leaves them as they are; otherwise they
    are quantized to 8 bits and multiplied as integers: "dynamic" over a range of each row's own, "static"
    with the quantizer of x_scale and x_zero_point (numbers, or 0-d fp32), which become buffers.
    Raises ValueError naming the argument.
    """

    FIXED = (*PackedLayer.FIXED, "x_scale", "x_zero_point")

    def __init__(
        self,
        packed: PackedWeight,
        bias: nn.Parameter | None = None,
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> None:
        super().__init__(packed)
        if activations not in ACTIVATIONS:
            fail("activations", f"one of {ACTIVATIONS}", repr(activations))
        self.activations = activations
        for name, value in (("x_scale", x_scale), ("x_zero_point", x_zero_point)):
            if (value is not None) != (activations == "static"):
                expected = "a number" if activations == "static" else "None"
                fail(name, f"{expected} with activations={activations!r}", value)
            if value is not None:
                value = torch.as_tensor(value, dtype=torch.float32, device=packed.codes.device)
            self.register_buffer(name, value)
        if activations == "static":
            check_input_quantizer(self.x_scale, self.x_zero_point)
        self.register_parameter("bias", bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] -> [..., rows]. Looks into the dicts of the module, past its slow __getattr__."""
        buffers, parameters = self._buffers, self._parameters
        # a replica of nn.DataParallel, and a parametrized layer, hold the bias elsewhere
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        weight, scale, zero_point = buffers["weight_packed"], buffers["scale"], buffers["zero_point"]
        if self.activations == "float":
            return functional.int_linear(x, weight, scale, zero_point, bias, self.bits)
        arguments = (x, weight, scale, zero_point, bias, self.bits, None)
        return functional.int_linear_quantized(*arguments, buffers["x_scale"], buffers["x_zero_point"])

    def _product_repr(self) -> str:
        activations = "" if self.activations == "float" else f", activations={self.activations}"
        return self._packing_repr() + activations
