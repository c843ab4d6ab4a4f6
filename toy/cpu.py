"""
What makes two CPU cores fast enough for the toy, and nothing that a GPU needs. A stage calls each
function in one line when its device is a CPU.
"""

import ctypes

import torch

from core.policy import TokenLogps


def speed_up_process():
    """
    Keep freed memory in this process: the system clears each page that it hands out again, which
    takes a tenth of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: below 32 MiB, allocate from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB at its end


def speed_up_policy(policy):
    """Compute a policy's matrix products with oneDNN."""
    TokenLogps.linear = product_with_gradient
    speed_up_linear_layers(policy.model)


def speed_up_linear_layers(model):
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OneDNNLinear


def speed_up_vllm():
    """
    Compute vLLM's matrix products with oneDNN on the weights as they are. To be called before
    vLLM starts: by itself it packs the matrices on a CPU, and every sync would have to unpack and
    pack them all again.
    """
    import vllm.model_executor.layers.utils as layers

    layers.dispatch_cpu_unquantized_gemm = leave_unpacked


def leave_unpacked(layer, remove_weight):
    layer.cpu_linear = product


def product(x, weight, bias=None):
    """x @ weight.T + bias by oneDNN; MKL, which torch calls, is half as fast on an AMD EPYC."""
    if x.dtype != torch.float32 or not has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_onednn():
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


class OneDNNProduct(torch.autograd.Function):
    """product() with a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # (..., I), (O, I), (O,) or None
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # (..., O)
        x, weight = ctx.saved_tensors
        x_needs, weight_needs, bias_needs = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_x = product(grad, weight.T) if x_needs else None
        grad_weight = product(rows.T, x.flatten(0, -2).T) if weight_needs else None
        grad_bias = rows.sum(0) if bias_needs else None
        return grad_x, grad_weight, grad_bias


def product_with_gradient(x, weight, bias=None):
    return OneDNNProduct.apply(x, weight, bias)


class OneDNNLinear(torch.nn.Linear):
    def forward(self, x):
        return product_with_gradient(x, self.weight, self.bias)
