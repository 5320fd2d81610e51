"""The ops that generated programs are made of, one a line, and the values that each of their arguments may take.

An argument is looked up in `DOMAINS` by its name, or by what stands after a colon. `?` marks what may be left out, `*`
what is given by name alone. An op is called as a torch function, as a method, and as any ATen overload that takes the
arguments; a name that ends in `_` writes to `self`. What an example refuses is not used: a line may be generous.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

POINTWISE = """
add             self other *alpha?
sub             self other *alpha?
rsub            self other *alpha?
mul             self other
div             self other *rounding_mode?
true_divide     self other
floor_divide    self other
remainder       self other
fmod            self other
pow             self exponent:other
float_power     self exponent:other
maximum         self other:tensor
minimum         self other:tensor
fmax            self other:tensor
atan2           self other:tensor
copysign        self other
ldexp           self other:tensor
heaviside       self values:tensor
nextafter       self other:tensor
hypot           self other:tensor
logaddexp       self other:tensor
gcd             self other:tensor
bitwise_and     self other
bitwise_xor     self other
bitwise_left_shift self other
logical_and     self other:tensor
logical_xor     self other:tensor
eq              self other
ne              self other
lt              self other
le              self other
gt              self other
ge              self other
isclose         self other:tensor rtol:number? atol:number? equal_nan:flag?
lerp            self end:tensor weight:other
addcmul         self tensor1:tensor tensor2:tensor *value:number?
addcdiv         self tensor1:tensor tensor2:tensor *value:number?
where           condition:mask self:tensor other
clamp           self min:bound? max:bound?
clip            self min:bound? max:bound?
clamp_min       self min:bound
masked_fill     self mask value:number
nan_to_num      self nan:number? posinf:number? neginf:number?
neg             self
abs             self
sign            self
signbit         self
square          self
reciprocal      self
exp             self
sqrt            self
sin             self
relu            self
sigmoid         self
round           self *decimals?
floor           self
trunc           self
frac            self
logit           self eps:number?
isnan           self
isinf           self
logical_not     self
bitwise_not     self
angle           self
conj_physical   self
polar           abs:tensor angle:tensor
complex         real:tensor imag:tensor
threshold       self threshold:number value:number
hardtanh        self min_val:number? max_val:number?
leaky_relu      self negative_slope:number?
elu             self alpha:number? scale:number? input_scale:number?
celu            self alpha:number?
softplus        self beta:number? threshold:number?
gelu            self *approximate?
fake_quantize_per_tensor_affine self scale:number zero_point:small quant_min:small quant_max:small
"""

SHAPES = """
view            self size:shape
reshape         self shape
view_as         self other:tensor
expand          self size:expansion
expand_as       self other:tensor
broadcast_to    self size:expansion
unsqueeze       self dim
squeeze         self dim?
transpose       self dim0:dim dim1:dim
swapaxes        self axis0:dim axis1:dim
permute         self dims
movedim         self source:dim destination:dim
t               self
mT              self
adjoint         self
flatten         self start_dim:dim? end_dim:dim?
unflatten       self dim sizes:pair
ravel           self
select          self dim index:small
narrow          self dim start:small length:small
slice           self dim? start:small? end:small? step:small?
diagonal        self offset:small? dim1:dim? dim2:dim?
as_strided      self size:pair stride:pair storage_offset:small?
unfold          self dimension:dim size:small step:small
split           self split_size:small dim?
split_with_sizes self split_sizes:pair dim?
chunk           self chunks:small dim?
tensor_split    self sections:small dim?
unbind          self dim?
detach          self
alias           self
contiguous      self *memory_format?
view_as_real    self
view_as_complex self
real            self
imag            self
conj            self
resolve_conj    self
resolve_neg     self
atleast_1d      self
atleast_2d      self
flip            self dims
fliplr          self
roll            self shifts:small dims:dim?
rot90           self k:small? dims:pair?
repeat          self repeats:pair
tile            self dims:pair
repeat_interleave self repeats:small dim?
pixel_shuffle   self upscale_factor:small
cat             tensors dim?
stack           tensors dim?
hstack          tensors
vstack          tensors
broadcast_tensors tensors
meshgrid        tensors
cartesian_prod  tensors
block_diag      tensors
constant_pad_nd self pad value:number?
tril            self diagonal:small?
triu            self diagonal:small?
diag            self diagonal:small?
diag_embed      self offset:small? dim1:dim? dim2:dim?
trace           self
"""

REDUCTIONS = """
sum             self dim? keepdim? *dtype?
nansum          self dim? keepdim? *dtype?
mean            self dim? keepdim? *dtype?
prod            self dim? keepdim? *dtype?
std             self dim? *correction? *keepdim?
var_mean        self dim? *correction? *keepdim?
amax            self dim? keepdim?
amin            self dim? keepdim?
aminmax         self *dim? *keepdim?
argmax          self dim? keepdim?
argmin          self dim? keepdim?
any             self dim? keepdim?
all             self dim? keepdim?
max             self dim? keepdim?
min             self dim? keepdim?
median          self dim? keepdim?
mode            self dim? keepdim?
logsumexp       self dim keepdim?
norm            self p:number? dim? keepdim? dtype?
count_nonzero   self dim?
cumsum          self dim *dtype?
cumprod         self dim *dtype?
cummax          self dim
cummin          self dim
logcumsumexp    self dim
diff            self n:small? dim? prepend:tensor? append:tensor?
sort            self dim? descending:flag?
sort            self *stable:flag dim? descending:flag?
argsort         self dim? descending:flag?
topk            self k:small dim? largest:flag? sorted:flag?
kthvalue        self k:small dim? keepdim?
unique          self sorted:flag? return_inverse:flag? return_counts:flag?
unique_consecutive self return_inverse:flag? return_counts:flag? dim?
nonzero         self
bincount        self weights:tensor? minlength:small?
histc           self bins:small? min:number? max:number?
bucketize       self boundaries:row *out_int32:flag? *right:flag?
searchsorted    sorted_sequence:row self:other *out_int32:flag? *right:flag?
softmax         self dim dtype?
log_softmax     self dim dtype?
cross           self other:tensor dim?
dot             self tensor
mm              self mat2:tensor
matmul          self other:tensor
addmm           self mat1:tensor mat2:tensor *beta:number? *alpha:number?
outer           self vec2:tensor
dist            self other:tensor p:number?
renorm          self p:number dim maxnorm:number
layer_norm      self normalized_shape:one weight:tensor? bias:tensor? eps:number?
equal           self other:tensor
allclose        self other:tensor rtol:number? atol:number? equal_nan:flag?
is_nonzero      self
"""

INDEXING = """
gather          self dim index
take            self index
take_along_dim  self indices:index dim?
index_select    self dim index:rows
masked_select   self mask
scatter         self dim index src:other
scatter_add     self dim index src:tensor
scatter_reduce  self dim index src:tensor reduce *include_self:flag?
index_add       self dim index:rows source:tensor *alpha?
index_copy      self dim index:rows source:tensor
index_fill      self dim index:rows value:other
index_put       self indices values:tensor accumulate:flag?
masked_scatter  self mask source:tensor
put             self index source:tensor accumulate:flag?
select_scatter  self src:tensor dim index:small
slice_scatter   self src:tensor dim? start:small? end:small? step:small?
diagonal_scatter self src:tensor offset:small? dim1:dim? dim2:dim?
as_strided_scatter self src:tensor size:pair stride:pair storage_offset:small?
embedding       weight:tensor indices:index padding_idx:small? scale_grad_by_freq:flag? sparse:flag?
one_hot         self:index num_classes:small?
isin            elements:tensor test_elements:other *assume_unique:flag? *invert:flag?
"""

FACTORIES = """
arange          end:extent *dtype?
arange          start:extent end:extent *dtype?
arange          start:extent end:extent step:extent *dtype?
linspace        start:number end:number steps:small *dtype?
full            size:shape fill_value:number *dtype?
zeros           size:shape *dtype?
ones            size:shape *dtype?
eye             n:small *dtype?
tril_indices    row:small col:small offset:small? *dtype?
scalar_tensor   s:number *dtype?
zeros_like      self *dtype? *memory_format?
ones_like       self *dtype?
full_like       self fill_value:number *dtype?
empty_like      self *dtype? *memory_format?
new_zeros       self size:shape *dtype?
new_ones        self size:shape *dtype?
new_full        self size:shape fill_value:number *dtype?
new_empty       self size:shape *dtype?
new_tensor      self data:data *dtype?
clone           self *memory_format?
to              self dtype *non_blocking:flag? *copy:flag? *memory_format?
to              self other:tensor *copy:flag?
type_as         self other:tensor
_to_copy        self *dtype? *memory_format?
float           self
long            self
int             self
bool            self
double          self
cpu             self
lift_fresh      self
lift_fresh_copy self
"""

RANDOM = """
rand            size:shape *dtype?
randn           size:shape
randint         high:small size:shape
randperm        n:small
rand_like       self
randint_like    self high:small
bernoulli       self
multinomial     self num_samples:small replacement:flag?
normal          mean:tensor std:number
poisson         self
dropout         self p:probability train:flag
alpha_dropout   self p:probability train:flag
rrelu           self lower:number? upper:number? training:flag?
"""

WRITES = """
add_            self other *alpha?
sub_            self other *alpha?
mul_            self other
div_            self other *rounding_mode?
floor_divide_   self other
remainder_      self other
pow_            self exponent:other
bitwise_and_    self other
eq_             self other
lerp_           self end:tensor weight:other
addcmul_        self tensor1:tensor tensor2:tensor *value:number?
clamp_          self min:bound? max:bound?
masked_fill_    self mask value:number
neg_            self
abs_            self
relu_           self
sigmoid_        self
square_         self
copy_           self src:tensor
fill_           self value:other
zero_           self
cumsum_         self dim *dtype?
tril_           self diagonal:small?
index_add_      self dim index:rows source:tensor *alpha?
index_copy_     self dim index:rows source:tensor
index_fill_     self dim index:rows value:other
index_put_      self indices values:tensor accumulate:flag?
scatter_        self dim index src:other
scatter_add_    self dim index src:tensor
masked_scatter_ self mask source:tensor
put_            self index source:tensor accumulate:flag?
fill_diagonal_  self fill_value:number wrap:flag?
unsqueeze_      self dim
squeeze_        self dim?
t_              self
transpose_      self dim0:dim dim1:dim
swapaxes_       self axis0:dim axis1:dim
resize_         self size:sizes
as_strided_     self size:pair stride:pair storage_offset:small?
detach_         self
set_            self source:tensor
renorm_         self p:number dim maxnorm:number
random_         self
uniform_        self
bernoulli_      self p:probability?
exponential_    self
"""

TABLE = POINTWISE + SHAPES + REDUCTIONS + INDEXING + FACTORIES + RANDOM


class Argument(NamedTuple):
    name: str
    domain: str
    is_optional: bool
    by_name: bool


class Line(NamedTuple):
    name: str
    arguments: tuple[Argument, ...]


def lines(table: str) -> list[Line]:
    found = []
    for line in filter(None, table.splitlines()):
        name, *arguments = line.split()
        found.append(Line(name, tuple(map(_argument, arguments))))
    return found


def _argument(text: str) -> Argument:
    bare = text.strip("*?")
    name, _, domain = bare.partition(":")
    return Argument(name, (domain or name).strip("?"), text.endswith("?"), text.startswith("*"))


NUMBERS = (
    0,
    1,
    2,
    -1,
    3,
    1.0,
    2.0,
    0.0,
    -0.0,
    0.5,
    -1.5,
    True,
    False,
    float("nan"),
    float("inf"),
    1e-40,
    2**31,
    1j,
    0j,
    -0j,
)
DTYPES = (
    torch.float32,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.float64,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.complex64,
)
Choices = Callable[[random.Random], Any]


def _one_of(*values: Any) -> Choices:
    return lambda rng: rng.choice(values)


def _list_of(least: int, most: int, *values: Any) -> Choices:
    return lambda rng: [rng.choice(values) for _ in range(rng.randint(least, most))]


# What is not here is a value of the program: see `sharing_generate`.
DOMAINS: dict[str, Choices] = {
    "number": _one_of(*NUMBERS),
    "bound": _one_of(None, 0, 1, -1, 1.0, 0.0, -0.0, 2.5, True),
    "alpha": _one_of(1, 2, 1.0, True, -1, 0.5, 0),
    "small": _one_of(0, 1, 2, 3, -1, True),
    "probability": _one_of(0.0, 0.5, 1.0, 0, 1),
    "dim": _one_of(0, 1, -1, -2, 2, [0], [1], [0, 1], [-1, 0], (0,), None),
    "dims": _one_of([0], [1, 0], [0, 1], (1, 0), [-1], [2, 0, 1], [0, 2, 1], 0),
    "keepdim": _one_of(True, False, 1, 0),
    "flag": _one_of(True, False),
    "dtype": _one_of(None, *DTYPES),
    "rounding_mode": _one_of(None, "floor", "trunc"),
    "approximate": _one_of("none", "tanh"),
    "reduce": _one_of("sum", "prod", "mean", "amax", "amin"),
    "correction": _one_of(0, 1, 1.0, 2, None),
    "decimals": _one_of(0, 1, -1),
    "memory_format": _one_of(torch.contiguous_format, torch.preserve_format, None),
    "shape": _one_of(
        (), (-1,), [-1], (3,), (2, -1), (-1, 2), (3, 2), [2, 3], (6,), (1, -1), (4,), (2, 2), 4, torch.Size([3])
    ),
    "sizes": _one_of((), (3,), (2, 2), [2, 3], (6,), (4,), (1, 1)),
    "expansion": _one_of((2, -1), (2, -1, -1), (-1, 3), (3, 3), (2, 3), (3, -1), (2, 2, 3), [4], (4, 3), (-1, -1)),
    "pair": _one_of((2, 2), (1, 1), [1, 2], (0, 1), (2, 1), (3,), (1,), [2], (1, 0), (2, 0), (3, 1)),
    "one": _one_of([3], (3,), [4], (2,), (2, 3)),
    "pad": _one_of((0, 1), (1, 0), [1, 1], (1, 0, 0, 1), (-1, 0)),
    "extent": _one_of(0, 1, 3, 4, 2.0, 4.0, -1, 0.5, True, 5, 2.5),
    "data": _one_of(1, 1.0, [1, 2], [1.0, -0.0], [True, False], (1, 2)),
}
