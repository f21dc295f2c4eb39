"""Which treatments of a matrix need data, and what takes their place where there is none."""

from dataclasses import replace

from fleetpress.compression import sparsity
from fleetpress.compression.scheme import DEFAULT_METHOD
from fleetpress.compression.treatment import Treatment


def needs_inputs(treatment: Treatment) -> bool:
    """Whether one of its methods looks at what the layer reads."""
    return without_inputs(treatment) != treatment


def without_inputs(treatment: Treatment) -> Treatment:
    """The treatment with methods that need no data in place of those that look at what the layer reads."""
    options = dict(treatment.sparsity)
    if options:
        options = dict(sparsity.without_data(options))
    method = treatment.method
    if method != DEFAULT_METHOD:  # without loading torch
        from fleetpress.compression.quantization import QUANTIZERS, method_for

        method = method_for(QUANTIZERS[method], None).name
    return replace(treatment, sparsity=tuple(options.items()), method=method)
