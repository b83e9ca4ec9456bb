"""Messages as text: the format of ``.prototxt`` files."""

from soonest.caffe.proto.text.parser import TextError, parse
from soonest.caffe.proto.text.printer import write

__all__ = ["TextError", "parse", "write"]
