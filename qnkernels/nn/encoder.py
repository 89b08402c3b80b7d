"""nn.TransformerEncoder: in eval torch may run a layer as one fused op, past its children's forwards."""

from collections.abc import Callable

from torch import nn

from .compressed import CompressedLayer
from .noisy import NoisyLayer

SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
SAVED = "fused_before_quantization"


def choose_encoder_path_(
    model: nn.Module, is_observed: Callable[[nn.Module], bool] = lambda layer: False
) -> None:
    """Turn the fused path off in encoders that hold noisy, compressed or observed layers, and on again in
    others.

    The fused op reads the weights of the linear layers itself, so that noise in eval would be skipped,
    stored weights decoded whole in each forward, and nothing observed.
    """
    for module in model.modules():
        for encoder, (switch, off) in SWITCHES.items():
            if not isinstance(module, encoder):
                continue
            if any(
                isinstance(child, NoisyLayer | CompressedLayer) or is_observed(child)
                for child in module.modules()
            ):
                module.__dict__.setdefault(SAVED, getattr(module, switch))
                setattr(module, switch, off)
            elif SAVED in module.__dict__:
                setattr(module, switch, module.__dict__.pop(SAVED))
