"""What the names of ops say about the weights they take."""

from __future__ import annotations

Place = int | str


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONVOLUTIONS = _words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")

# Matrix products and convolutions -> positions and keywords that are not a weight: the activation, the bias.
GEMM: dict[str, frozenset[Place]] = {
    **dict.fromkeys(_words("matmul mm bmm mv einsum tensordot inner chain_matmul multi_dot kron"), frozenset[Place]()),
    **dict.fromkeys(_words("grouped_mm _grouped_mm _scaled_mm"), frozenset[Place]({"bias"})),
    **dict.fromkeys(_words("lstm gru rnn_tanh rnn_relu"), frozenset[Place]({0, 1, "input", "hx"})),
    **dict.fromkeys(_words("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"), frozenset[Place]({0, 1, "input", "hx"})),
    **dict.fromkeys(_CONVOLUTIONS | {"linear", "convolution"}, frozenset[Place]({0, 2, "input", "bias"})),
    **dict.fromkeys(_words("addmm addbmm baddbmm addmv"), frozenset[Place]({0, "input"})),
    "bilinear": frozenset({0, 1, 3, "input1", "input2", "bias"}),
    "deform_conv2d": frozenset({0, 2, 3, 4}),
    "multi_head_attention_forward": frozenset({0, 1, 2, "query", "key", "value", 7, 8, "bias_k", "bias_v"}),
    "_transformer_encoder_layer_fwd": frozenset({0, "src"}),
}
GEMM_MODULES = _CONVOLUTIONS | _words("linear bilinear multi_head_attention lstm gru rnn lstm_cell gru_cell rnn_cell")
EMBEDDING = _words("embedding embedding_bag")

# The result has the values of the argument, moved, repeated or cast.
VIEWS = _words("""
    T mT H t transpose permute adjoint swapaxes swapdims movedim moveaxis flip roll
    view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as repeat repeat_interleave
    chunk split split_with_sizes tensor_split unbind narrow select getitem unfold rearrange
    cat concat concatenate stack hstack vstack dstack
    to type type_as float half bfloat16 double data clone contiguous detach alias identity
""")
# Element by element, zero stays zero. Sizes must agree: a broadcast factor is a scale, not a weight.
KEEPS_ZEROS = _words("mul neg abs dropout mask")
# Zeros of the first argument stay; the others are divisors, gains, indices.
KEEPS_FIRST = _words("div truediv normalize _weight_norm _weight_norm_interface")
# The other arguments only choose among the values of the first.
SELECTS = _words("getitem index_select gather take_along_dim")
# Take the shape or dtype of an argument and none of its values.
LIKE_FIRST = _words("zeros_like ones_like empty_like full_like rand_like randn_like")
LIKE_SECOND = _words("view_as reshape_as expand_as type_as")
