"""Fused log-prob kernels: each file holds the reference, the kernels, the autograd function, one public function."""

from kernels.linear_logprobs import linear_logprobs

__all__ = ["linear_logprobs"]
