"""Log-prob kernels, each with its reference, Triton kernels, autograd function and one public function.

Read next: kernels/linear_logprobs.py, kernels/linear_paths.py, kernels/triton_parts.py, kernels/linear_triton.py.
"""

from kernels.linear_logprobs import linear_logprobs
from kernels.log_softmax import selective_log_softmax
from kernels.preference_loss import preference_loss

__all__ = ["linear_logprobs", "preference_loss", "selective_log_softmax"]
