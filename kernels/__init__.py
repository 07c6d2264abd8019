"""Kernels of log-probs, losses and packed weights: each with reference, Triton kernels, autograd and public function.

Read next: kernels/linear_logprobs.py, kernels/linear_paths.py, kernels/triton_parts.py, kernels/linear_triton.py.
"""

from kernels.linear_logprobs import linear_logprobs
from kernels.log_softmax import selective_log_softmax
from kernels.mxfp4 import Packed, dequantise, rows_linear
from kernels.preference_loss import preference_loss

__all__ = ["Packed", "dequantise", "linear_logprobs", "preference_loss", "rows_linear", "selective_log_softmax"]
