"""Messages as bytes: ``.caffemodel``, ``.solverstate`` and mean files."""

from soonest.caffe.wire.decoder import WireError, decode
from soonest.caffe.wire.encoder import encode

__all__ = ["WireError", "decode", "encode"]
