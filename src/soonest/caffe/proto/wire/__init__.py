"""Messages as bytes: ``.caffemodel``, ``.solverstate`` and mean files."""

from soonest.caffe.proto.wire.decoder import WireError, decode
from soonest.caffe.proto.wire.encoder import encode

__all__ = ["WireError", "decode", "encode"]
