"""What pyproject.toml cannot say in setuptools' stable words: compiled kernels, which an install may do without."""

from setuptools import Extension, setup


def library(name: str, source: str) -> Extension:
    """A plain library beside a package's files, which load it with ctypes; no module to import."""
    return Extension(
        name,
        sources=[source],
        depends=["setup.py"],
        # Rounding is part of the result: no fused operations. The last flag lets gcc turn choices into vector code.
        extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"],
        optional=True,  # without a compiler torch and NumPy do the work
        py_limited_api=True,  # it uses nothing of Python: one library for every version
    )


setup(
    ext_modules=[
        library("fleetpress.compression.kernels._quantize", "compression/kernels/quantize.c"),
        library("fleetpress.storage._symbols", "storage/symbol_kernel.c"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
