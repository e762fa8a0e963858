"""What the names of ops say about the weights they take."""

from __future__ import annotations

Place = int | str


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONVOLUTIONS = _words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")

# Matrix products and convolutions -> positions and keywords that are not a weight: the activation, the bias.
# Names of torch functions and of the aten ops below them.
GEMM: dict[str, frozenset[Place]] = {
    **dict.fromkeys(_words("matmul mm bmm mv einsum tensordot inner chain_matmul multi_dot kron"), frozenset[Place]()),
    **dict.fromkeys(
        _words("grouped_mm _grouped_mm _scaled_mm scaled_mm scaled_grouped_mm"), frozenset[Place]({"bias"})
    ),
    **dict.fromkeys(_words("lstm gru rnn_tanh rnn_relu"), frozenset[Place]({0, 1, "input", "hx"})),
    **dict.fromkeys(_words("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"), frozenset[Place]({0, 1, "input", "hx"})),
    **dict.fromkeys(
        _CONVOLUTIONS | _words("linear convolution _convolution conv_tbc mkldnn_linear"),
        frozenset[Place]({0, 2, "input", "bias"}),
    ),
    **dict.fromkeys(_words("addmm addbmm baddbmm addmv sspaddmm _addmm_activation"), frozenset[Place]({0, "input"})),
    "bilinear": frozenset({0, 1, 3, "input1", "input2", "bias"}),
    "deform_conv2d": frozenset({0, 2, 3, 4}),
    "mkldnn_rnn_layer": frozenset({0, 3, 4, 5, 6}),
    "multi_head_attention_forward": frozenset({0, 1, 2, "query", "key", "value", 7, 8, "bias_k", "bias_v"}),
    "_native_multi_head_attention": frozenset({0, 1, 2, "query", "key", "value"}),
    "_transformer_encoder_layer_fwd": frozenset({0, "src"}),
}
# Those whose weight has a place of its own: there a scaled weight is a weight still.
HAS_WEIGHT_PLACE = _CONVOLUTIONS | _words("linear convolution _convolution bilinear deform_conv2d")
GEMM_MODULES = _CONVOLUTIONS | _words("linear bilinear multi_head_attention lstm gru rnn lstm_cell gru_cell rnn_cell")
EMBEDDING = _words("embedding embedding_bag")

# The result has the values of the argument, moved, repeated or cast.
VIEWS = _words("""
    T mT H t transpose permute adjoint swapaxes swapdims movedim moveaxis flip roll diagonal
    view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as repeat repeat_interleave
    chunk split split_with_sizes tensor_split unbind narrow select slice getitem unfold rearrange pad
    cat concat concatenate stack hstack vstack dstack block_diag
    to type type_as float half bfloat16 double data clone contiguous detach alias identity
    _to_copy _unsafe_view _reshape_alias unsafe_chunk unsafe_split unsafe_split_with_sizes lift_fresh
    constant_pad_nd as_strided view_as_complex view_as_real
""")
# Those that leave every element at its place.
CASTS = _words("to type type_as float half bfloat16 double data clone contiguous detach alias identity _to_copy")
# Element by element, zero stays zero. Sizes must agree: a broadcast factor is a scale, not a weight.
KEEPS_ZEROS = _words("""
    mul multiply neg abs dropout native_dropout mask tril triu tanh sign sgn round trunc relu square hardtanh
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
""")
# Zeros of the first argument stay; the others are divisors, gains, indices.
KEEPS_FIRST = _words("div divide truediv normalize _weight_norm _weight_norm_interface")
# Zero where all arguments are.
KEEPS_COMMON = _words("add sub")
# The other arguments only choose among the values of the first.
SELECTS = _words("getitem index index_select gather take_along_dim")
# Take the shape or dtype of an argument and none of its values.
LIKE_FIRST = _words("zeros_like ones_like empty_like full_like rand_like randn_like")
LIKE_SECOND = _words("view_as reshape_as expand_as type_as")
# Keep a value under a name and compute nothing.
STORES = _words("assign_buffer")

# What the consumer of a parameter that is no weight says about it.
SCALES = _words("mul multiply div divide truediv")
SUMMANDS = _words("add sub rsub iadd isub addcmul")
JOINS = _words("cat concat concatenate stack hstack vstack dstack where setitem index_put masked_scatter copy")
NORMS = _words("layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm native_group_norm")
