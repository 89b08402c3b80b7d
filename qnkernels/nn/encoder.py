"""nn.TransformerEncoder: in eval torch may run a layer as one fused op, past its children's forwards."""

from torch import nn

from .compressed import CompressedLayer
from .noisy import NoisyLayer

SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
SAVED = "fused_before_quantization"


def choose_encoder_path_(model: nn.Module) -> None:
    """Turn the fused path off in encoders that hold noisy or compressed layers, and on again in others.

    The fused op reads the weights of the linear layers itself, so that noise in eval would be skipped
    and stored weights decoded whole in each forward.
    """
    for module in model.modules():
        for encoder, (switch, off) in SWITCHES.items():
            if not isinstance(module, encoder):
                continue
            if any(isinstance(child, NoisyLayer | CompressedLayer) for child in module.modules()):
                module.__dict__.setdefault(SAVED, getattr(module, switch))
                setattr(module, switch, off)
            elif SAVED in module.__dict__:
                setattr(module, switch, module.__dict__.pop(SAVED))
