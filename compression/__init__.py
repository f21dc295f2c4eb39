"""Pure functions of tensors and exported programs: prune, quantize, train, measure.

Nothing here opens a file or a socket, reads a clock, logs, or imports ray, boto3, pydantic or yaml.
"""

import os as _os

if __name__ == "compression":  # found by folder name: the repository root is on sys.path
    # From 3.14 the standard library has a package of this name (PEP 784): let its modules be found too.
    __path__.append(_os.path.join(_os.path.dirname(_os.__file__), "compression"))
