"""Compares the exported graphs with the PyTorch model doing the same arithmetic.

The reference is the Hugging Face model as transformers loads it, in float32, with scoring, selection and fake
quantization done by `numerics/` (NumPy). Nothing of the exporter takes part in it, but for the reading of pre-quantized
weights, which transformers would leave to the quantizers' own libraries, and of the layers of a model that is too large
to be loaded whole.

Rounding to 4 bits makes a deep network chaotic: float sums in another order move a few activations across a rounding
boundary, each by a whole step, and a few layers later the two sides differ as much as two draws of quantization noise
(measured at LLaVA-1.5-7B's sizes with 2 layers: cosine of logits 0.976). So every quantized activation is compared
where it is made, code by code, and so is every quantized weight, and the reference goes on with the graph's codes: what
is left to compare at the end is float rounding.
"""

from qavp_export.parity.check import Parity, check_parity
from qavp_export.parity.decoders import Exported
from qavp_export.parity.layers import DecoderLayer

__all__ = ["DecoderLayer", "Exported", "Parity", "check_parity"]
