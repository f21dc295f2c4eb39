"""What can go wrong with tensors and programs; each message says where and what to do.

CompressionError
├── ProgramError        the graph cannot be read or edited as asked
├── TargetError         a target names no layer, or a layer no method supports
├── MethodError         options that a method cannot work with
├── PruningError        nothing can be deleted, or a deletion is not safe
├── QuantizationError   a weight cannot be quantized (NaN, infinite, unknown dtype)
├── NotFiniteError      a weight holds NaN or infinity
├── DataMismatchError        arrays that do not fit the program or the loss
├── TrainingDivergedError    loss or gradients became NaN or infinite
└── DeviceMissingError       a step is to run on a GPU, and there is none
"""


class CompressionError(Exception):
    """Root of this package's errors."""


class ProgramError(CompressionError):
    """The graph cannot be read or edited as asked."""


class TargetError(CompressionError):
    """A target names no layer, or a layer that no method supports."""


class MethodError(CompressionError):
    """Options that a method cannot work with."""


class PruningError(CompressionError):
    """Nothing can be deleted, or a deletion is not safe."""


class QuantizationError(CompressionError):
    """A weight cannot be quantized."""


class NotFiniteError(CompressionError):
    """A weight holds NaN or infinity: nothing good can come of it."""


class DataMismatchError(CompressionError):
    """Arrays that do not fit the program or the loss."""


class TrainingDivergedError(CompressionError):
    """Loss or gradients became NaN or infinite."""


class DeviceMissingError(CompressionError):
    """A step is to run on a GPU, and there is none."""
