"""Export to ONNX: a checkpoint becomes a graph that ONNX Runtime serves without torch.

Importing this package, or ``lenvm.export.artifact``, needs neither torch nor onnx; ``lenvm.export.run`` needs both.
"""

from __future__ import annotations

from lenvm.export.artifact import VARIANTS, ExportInfo, Variant, backend_of

__all__ = ["VARIANTS", "ExportInfo", "Variant", "backend_of"]
