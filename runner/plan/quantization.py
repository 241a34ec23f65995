"""Exact bytes of quantised weights, and what a quantised matrix product keeps and borrows.

Everything here was read from bitsandbytes 0.50.2 (`functional.py`, `nn/modules.py`, `autograd/_functions.py`,
`backends/cuda/ops.py`) and transformers 5.23 (`integrations/bitsandbytes.py`); tests/plan/test_quantization.py
compares the sizes with the tensors those libraries really hold. M tokens, K inputs, N outputs, n = K·N values,
B = ceil(n / 64) blocks, w = bytes of the compute type (2 for bf16). On a GPU, in the order of allocation:

| product | tensor | bytes | until |
|---|---|---|---|
| nf4 forward, more than 1,536 tokens (fewer on most GPUs) | absmax, dequantised | 4·B (double quantisation) | return |
| | the same plus its offset | 4·B (double quantisation) | return |
| | the matrix, dequantised | w·n | return |
| | output | w·M·N | the caller's |
| nf4 forward, a few tokens (fused kernel) | output | w·M·N | the caller's |
| nf4 backward | absmax, dequantised | 4·B (double quantisation) | matrix made |
| | the matrix, dequantised | w·n | return |
| | gradient of the input | w·M·K | the caller's |
| int8 forward | input in fp16 (no copy if it is fp16) | 2·M·K | quantised |
| | scales of its rows | 4·M | return |
| | input in int8 | M·K | return |
| | its absolute values | 2·M·K | compared |
| | mask of outliers | M·K | quantised |
| | outlier columns of the input (o of K) | w·M·o | backward |
| | their columns of the weights: int8, fp32, compute type | (1 + 4 + w)·N·o | return |
| | product in int32 | 4·M·N | dequantised |
| | product in fp16 | 2·M·N | converted |
| | product in the compute type (no copy if it is fp16) | w·M·N | the caller's |
| | the same plus the outliers' part (where o > 0) | w·M·N | the caller's |
| int8 backward | the matrix, dequantised | w·n | return |
| | gradient of the input | w·M·K | the caller's |

Without double quantisation absmax is fp32 already and nothing of it is made anew. On a CPU int8 training
dequantises the matrix in forward as well (`MatMul8bitFp`), and keeps its input like `MatMul8bitLt`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from runner.plan.model_shape import LayerShape, Matrix, Shape

MethodName = Literal["full", "freeze", "lora", "qlora4", "qlora8", "peft"]

BLOCK = 64  # values that share one absmax: Params4bit's default blocksize
BLOCK_2 = 256  # absmax values that share one: quantize_4bit, compress_statistics
CODE = 16 * 4  # get_4bit_type makes a new fp32 table for every matrix
CODE_2 = 256 * 4  # quantize_blockwise copies its fp32 table (copy=True) for every matrix
OFFSET = 4  # fp32 mean of absmax, subtracted before it is quantised
SHARED_CODE_2 = CODE_2  # functional.name2qmap["dynamic"]: one per process, beside the copies


def nf4_bytes(inputs: int, outputs: int, *, double_quant: bool = True, bytes_storage: int = 2) -> int:
    """Bytes that one `Linear4bit` weight holds on its own: codes, scales and its own copies of the tables.

    `bytes_storage` is the width of the type the codes are packed in (bf16 here, see
    runner/train/model_loading.py). fp4 is the same size. Not in it: `SHARED_CODE_2`, once per process.
    """
    values = inputs * outputs
    packed = (values + 1) // (2 * bytes_storage) * bytes_storage
    blocks = -(-values // BLOCK)
    if not double_quant:
        return packed + 4 * blocks + CODE
    return packed + blocks + CODE + 4 * -(-blocks // BLOCK_2) + CODE_2 + OFFSET


def int8_bytes(inputs: int, outputs: int) -> int:
    """Bytes of one `Linear8bitLt` weight: int8 values (`CB`) and an fp32 scale per row (`SCB`).

    The first forward pass hands both from the parameter to the module's state without a copy. Each
    pass leaves the indices of its outlier columns there too (`state.idx`, 8 bytes each, a handful).
    """
    return inputs * outputs + 4 * outputs


def dequantised_bytes(
    inputs: int, outputs: int, kind: Literal["nf4", "int8"], *, bytes_16: int = 2, double_quant: bool = True
) -> int:
    """Most bytes borrowed at once to use one quantised weight in 16 bits: the matrix, and for nf4 its scales.

    nf4 in forward with many tokens (the larger case: backward makes the scales once, not twice);
    int8 in backward only, as its forward multiplies in int8.
    """
    values = inputs * outputs
    scales = 2 * 4 * -(-values // BLOCK) if kind == "nf4" and double_quant else 0
    return bytes_16 * values + scales


def load_peak_nf4(inputs: int, outputs: int, *, bytes_16: int = 2, double_quant: bool = True) -> int:
    """Most GPU bytes while one matrix is quantised on loading, its own result included.

    transformers moves the 16-bit matrix to the GPU and quantises it there, one matrix at a time. With
    double quantisation absmax lives as fp32, as fp32 less its mean, and as codes at once.
    """
    blocks = -(-inputs * outputs // BLOCK)
    scales = 2 * 4 * blocks if double_quant else 0
    return bytes_16 * inputs * outputs + scales + nf4_bytes(inputs, outputs, double_quant=double_quant)


def load_peak_int8(inputs: int, outputs: int, *, bytes_16: int = 2) -> int:
    """Most GPU bytes while one matrix is quantised on loading, its own result included.

    transformers moves the 16-bit matrix to the GPU and back to the host (`value.to("cpu")`), and
    bitsandbytes copies that to the GPU as fp16 once more, while the first is still there.
    """
    return (bytes_16 + 2) * inputs * outputs + int8_bytes(inputs, outputs)


def load_peak_experts(
    matrix: Matrix, method_name: Literal["qlora4", "qlora8"], *, bytes_16: int = 2, double_quant: bool = True
) -> int:
    """Most GPU bytes while the experts of a layer become one quantised parameter, its own result included.

    Where the file has one matrix for each expert, transformers moves those of a parameter to the GPU and joins them
    there: twice its 16-bit size (`MergeModulelist`, `Concatenate`). Quantising then takes the joined ones and, for 4
    bits, the scales and the result; for 8 bits the result, the scales twice, and one expert in fp32.
    """
    joined = bytes_16 * matrix.weights
    if method_name == "qlora4":
        values = matrix.inputs, matrix.outputs * matrix.count
        return max(2 * joined, load_peak_nf4(*values, bytes_16=bytes_16, double_quant=double_quant))
    rows = matrix.outputs * matrix.count
    return max(2 * joined, joined + matrix.weights + (4 + bytes_16) * rows + 4 * matrix.inputs * matrix.outputs)


def saved_nf4(tokens: int, inputs: int) -> int:
    """Bytes that `MatMul4Bit` keeps for backward beside the weight itself: none, not even its input.

    A frozen weight needs only the gradient of its output; `ctx.tensors` is `(None, packed weight)`.
    """
    del tokens, inputs
    return 0


def saved_int8(tokens: int, inputs: int, *, bytes_16: int = 2, outliers: int = 0) -> int:
    """Bytes that `MatMul8bitLt` keeps for backward: its input [tokens, inputs], though it never reads it again.

    It stands in `ctx.tensors`, not in `save_for_backward`, with the `outliers` columns of the input and
    their indices. So PyTorch's non-reentrant checkpointing, which transformers 5 uses, does not see
    it and cannot drop it: with checkpointing every layer's inputs of q/k/v (one tensor), o, gate/up
    (one tensor) and down stay until backward. Products that share an input keep it once. The
    reentrant kind, which TRL 1.16 takes for adapters under ZeRO-3, does drop it.
    """
    return bytes_16 * tokens * (inputs + outliers) + 8 * outliers


def matrix_bytes(matrix: Matrix, method_name: MethodName, *, bytes_16: int = 2, double_quant: bool = True) -> int:
    """Bytes of a layer's matrix or matrices alike, with biases, which stay in 16 bits.

    A mixture's experts are one parameter: 4 bits have one table for all of them, 8 bits a scale for each row.
    """
    if not (matrix.linear or matrix.fused) or method_name not in ("qlora4", "qlora8"):
        return bytes_16 * matrix.parameters
    count, outputs = (1, matrix.outputs * matrix.count) if matrix.fused else (matrix.count, matrix.outputs)
    if method_name == "qlora4":
        one = nf4_bytes(matrix.inputs, outputs, double_quant=double_quant, bytes_storage=bytes_16)
    else:
        one = int8_bytes(matrix.inputs, outputs)
    return count * one + bytes_16 * (matrix.parameters - matrix.weights)


@lru_cache(maxsize=4096)
def base_bytes(shape: Shape, method_name: MethodName, *, bytes_16: int = 2, double_quant: bool = True) -> int:
    """Bytes of the weights as loaded: linear layers of the decoder and experts quantised, all else in `bytes_16`.

    All else is the embeddings, the head (transformers leaves the output embeddings alone), norms, biases
    and routers. The 4-bit codes are packed in the same type. Weights that train in fp32 are the caller's affair.
    """
    if method_name not in ("qlora4", "qlora8"):
        return bytes_16 * shape.num_parameters

    def size(layer: LayerShape) -> int:
        matrices = (matrix_bytes(m, method_name, bytes_16=bytes_16, double_quant=double_quant) for m in layer.matrices)
        return sum(matrices) + bytes_16 * layer.norm_parameters

    outside = shape.embedding_parameters + shape.head_parameters + shape.final_norm_parameters
    return shape.over_layers(size) + bytes_16 * outside


def largest_load_peak(
    shape: Shape, method_name: Literal["qlora4", "qlora8"], *, bytes_16: int = 2, double_quant: bool = True
) -> int:
    """GPU bytes that loading needs beyond the finished model: the largest matrix's peak less its own size."""
    extra = 0
    for m in shape.matrices:
        if m.linear and method_name == "qlora4":
            peak = load_peak_nf4(m.inputs, m.outputs, bytes_16=bytes_16, double_quant=double_quant)
            extra = max(extra, peak - nf4_bytes(m.inputs, m.outputs, double_quant=double_quant))
        elif m.fused:
            peak = load_peak_experts(m, method_name, bytes_16=bytes_16, double_quant=double_quant)
            own = matrix_bytes(m, method_name, bytes_16=bytes_16, double_quant=double_quant)
            extra = max(extra, peak - own)
        elif m.linear:
            peak = load_peak_int8(m.inputs, m.outputs, bytes_16=bytes_16)
            extra = max(extra, peak - int8_bytes(m.inputs, m.outputs))
    return extra
