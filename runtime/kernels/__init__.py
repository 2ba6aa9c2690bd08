"""What a packed forward computes between its matrix products.

`plain.py` states every operation in plain torch: the reference, and what CUDA and unusual shapes
run. `cpu.py` replaces them by the compiled kernels of `compiled.py` (written with `simd.py`);
`cuda.py` replaces attention by torch's paged variable-length attention. `choose.py` picks one at
start, after holding it against the reference on the device at hand.
"""
