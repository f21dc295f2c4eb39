"""What short forms of graphs have in common: the dictionary that their compressed text refers to.

It is part of the format: a file that was written with it needs it again, byte for byte.
"""

import json

# Operators with the names of their arguments, as `graph_form` writes them; the commonest ones last, where references
# are shortest. An asterisk marks an argument that is passed by name.
_SIGNATURES = """
exp.default self
sqrt.default self
abs.default self
clamp.default self min max
hardtanh.default self min_val max_val
elu.default self
softplus.default self
where.self condition self other
eq.Scalar self other
masked_fill.Scalar self mask value
clone.default self
to.dtype self dtype
zeros_like.default self *pin_memory
full.default size fill_value *device *pin_memory
ones.default size *device *pin_memory
arange.start_step start end step *device *pin_memory
stack.default tensors dim
index_select.default self dim index
gather.default self dim index
cumsum.default self dim
bmm.default self mat2
addmm.default self mat1 mat2
log_softmax.int self dim
max.dim self dim keepdim
argmax.default self dim keepdim
pad.default self pad
constant_pad_nd.default self pad value
instance_norm.default input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled
conv1d.default input weight bias stride padding dilation groups
conv3d.default input weight bias stride padding
rms_norm.default input normalized_shape weight eps
mul.Scalar self other
add.Scalar self other
sub.Tensor self other
relu6.default self
hardsigmoid.default self
avg_pool2d.default self kernel_size stride padding
avg_pool1d.default self kernel_size stride
max_pool1d.default self kernel_size stride
gru.input input hx params has_biases num_layers dropout train bidirectional batch_first
expand.default self size
sin.default self
neg.default self
cos.default self
rsqrt.default self
pow.Tensor_Scalar self exponent
gelu.default self *approximate
split.Tensor self split_size dim
softmax.int self dim
div.Tensor self other
matmul.default self other
arange.default end *device *pin_memory
split_with_sizes.default self split_sizes dim
adaptive_max_pool1d.default self output_size
conv1d.default input weight bias
leaky_relu.default self
glu.default self dim
conv1d.default input weight bias stride padding
sum.dim_IntList self dim
chunk.default self chunks dim
upsample_bilinear2d.vec input output_size align_corners scale_factors
pixel_shuffle.default self upscale_factor
group_norm.default input num_groups weight bias eps cudnn_enabled
max_pool2d.default self kernel_size
conv_transpose2d.input input weight bias stride padding output_padding groups
prelu.default self weight
hardswish.default self
add_.Tensor self other
relu_.default self
avg_pool2d.default self kernel_size
detach_.default self
lift_fresh_copy.default self
scaled_dot_product_attention.default query key value attn_mask dropout_p is_causal
conv_transpose2d.input input weight bias stride
gelu.default self
mean.dim self dim
silu.default self
mean.dim self dim keepdim
conv2d.default input weight bias stride
tanh.default self
scaled_dot_product_attention.default query key value
_operator.mul a b
squeeze.dim self dim
lstm.input input hx params has_biases num_layers dropout train bidirectional batch_first
max_pool2d.default self kernel_size stride
sigmoid.default self
conv2d.default input weight
max_pool2d.default self kernel_size stride padding
permute.default self dims
contiguous.default self
unsqueeze.default self dim
unflatten.int self dim sizes
zeros.default size *dtype *device *pin_memory
linear.default input weight
conv2d.default input weight bias stride padding dilation groups
mul.Tensor self other
embedding.default weight indices
cat.default tensors dim
adaptive_avg_pool2d.default self output_size
slice.Tensor self dim start end
layer_norm.default input normalized_shape weight bias eps cudnn_enable
reshape.default self shape
select.int self dim index
dropout.default input p train
transpose.int self dim0 dim1
conv2d.default input weight bias
flatten.using_ints self start_dim
conv2d.default input weight bias stride padding
view.default self size
batch_norm.default input weight bias running_mean running_var training momentum eps cudnn_enabled
sym_size.int self dim
add.Tensor self other
relu.default self
linear.default input weight bias
"""

_ENDS = (
    ',[["s77",2]],[["s77",1,null]],[["s31",2]],[["s31",1,null]],null,null,{"torch_version":"2.',
    '.num_batches_tracked",{"dtype":5,"sizes":[]},"b"],[".running_mean",[64],"b"],[".running_var",[32],"b"],["',
    "false,0.1,1e-05,false,[2,2],[2,2],[1,1],[1,1],[-1,-2],[1,128,[-1,",
    "embeddings.word_embeddings.encoder.layer.attention.self.query.key.value.output.dense.LayerNorm.classifier.",
    "features.block.layers.norm1.norm2.proj.blocks.head.fc1.fc2.fc3.conv1.conv2.bn1.bn2.downsample.layer1.layer2.",
    '{"scheme":{"group_size":128,"num_bits":4,"strategy":"group","symmetric":true,"type":"int"}}',
    '{"scheme":{"group_size":null,"num_bits":8,"strategy":"channel","symmetric":false,"type":"int"}}',
    '{"zero_point":["U8",["r",1]]}',
    ',[[0,{"codes":["U8",["r","c"]],"scale":["F32",["r",1]]},',
    "[1,0,1,0,1,0,1,0]]",
    '[[[["0.weight",[10,1],"p"],["0.bias",[10],"p"],["input",[-1,1,28,28]]],[["x",[-1,3,32,32]]],[[0,1,[1],[-1,784]],[1,1,0,0,[-1,10]],',
)


def dictionary() -> bytes:
    """The text, the likeliest parts last."""
    lines = [line.split() for line in _SIGNATURES.strip().splitlines()]
    signatures = [[_full(target), *names] for target, *names in lines]
    return (json.dumps(signatures, separators=(",", ":")) + "".join(_ENDS)).encode()


def _full(target: str) -> str:
    return target if target.startswith("_") else f"torch.ops.aten.{target}"
