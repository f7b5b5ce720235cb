"""The production runtime: loads a bundle and answers questions about images.

Needs NumPy, ONNX Runtime, transformers (tokenizer and image processor), jinja2 (chat template) and Pillow; neither
torch nor the exporter.
"""

from qavp_export.runtime.batching import Prepared
from qavp_export.runtime.images import ImageSource
from qavp_export.runtime.model import QavpModel
from qavp_export.runtime.sampling import Sampling

__all__ = ["ImageSource", "Prepared", "QavpModel", "Sampling"]
