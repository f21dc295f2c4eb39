"""What pyproject.toml cannot say in setuptools' stable words: the compiled kernel, which an install may do without."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            # A plain library beside the package's __init__.py, which loads it with ctypes; no module to import.
            "fleetpress.compression.kernels._quantize",
            sources=["compression/kernels/quantize.c"],
            depends=["setup.py"],
            # Rounding is part of the result: no fused operations. The last flag lets gcc turn choices into vector code.
            extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math"],
            optional=True,  # without a compiler the torch code does the work
            py_limited_api=True,  # it uses nothing of Python: one library for every version
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
