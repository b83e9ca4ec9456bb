"""Messages as text: the format of ``.prototxt`` files."""

from soonest.caffe.text.parser import TextError, parse
from soonest.caffe.text.printer import write

__all__ = ["TextError", "parse", "write"]
