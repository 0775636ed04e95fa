"""The ops of CLIP in NumPy (reference.py); native kernels lie beside it. Start at README.md."""
