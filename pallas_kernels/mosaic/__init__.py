"""Kernels for NVIDIA Hopper (sm_90a) in Pallas Mosaic GPU.

Each runs on the device, or anywhere in Pallas's interpreter, which simulates thread groups,
barriers and asynchronous copies and can look for races; and each compiles to machine code without a
GPU (`python -m pallas_kernels.sass_check`).
"""
