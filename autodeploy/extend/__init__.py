"""What third parties need for kinds, backends, fields and passes of their own; nothing else is promised to stay.

Packages announce theirs by the entry-point groups `autodeploy.kinds`, `autodeploy.backends`, `autodeploy.fields` and
`autodeploy.passes`; scripts call `register_kind` and `register_backend`.
"""

from autodeploy.errors import UnsupportedFeature
from autodeploy.graph.edit import Pass, get_attribute, near_miss
from autodeploy.graph.effects import is_pure
from autodeploy.graph.values import record_values
from autodeploy.kernels.registry import register_backend
from autodeploy.metadata import fields
from autodeploy.metadata.field import field
from autodeploy.metadata.span import Chunk, Full, Span, Window, span_of
from autodeploy.ops.backend import Backend, why_not_dtype
from autodeploy.ops.cache import Cache, Paged, State
from autodeploy.ops.kind import Door, Kind
from autodeploy.ops.kinds import register_kind
from autodeploy.ops.kinds.attention import AttentionFacts, PagedAttention
from autodeploy.ops.kinds.causal_conv1d import CachedConv1d, ConvFacts
from autodeploy.ops.site import Site, path_of, recorded

__all__ = [
    "AttentionFacts",
    "Backend",
    "Cache",
    "CachedConv1d",
    "Chunk",
    "ConvFacts",
    "Door",
    "Full",
    "Kind",
    "Paged",
    "PagedAttention",
    "Pass",
    "Site",
    "Span",
    "State",
    "UnsupportedFeature",
    "Window",
    "field",
    "fields",
    "get_attribute",
    "is_pure",
    "near_miss",
    "path_of",
    "record_values",
    "recorded",
    "register_backend",
    "register_kind",
    "span_of",
    "why_not_dtype",
]
