"""Ahead-of-time compilation of Mosaic GPU kernels to sm_90a on a machine without a GPU.

Lowering for CUDA only embeds a serialized MLIR module in the program; the CUDA plugin compiles it
when the program is loaded. The plugin's wheel exports that compiler (`MosaicGpuCompile`), which
asks the driver for little more than the device's architecture: a stand-in driver answers.

  lower       takes the modules out of a jitted function's lowering
  toolchain   finds the plugin, libdevice, nvdisasm, and builds the stand-in driver
  worker      a process of its own that compiles one module
  build       runs workers, several at once and each under a time limit
  report      what ptxas and the machine code say: registers, spills, shared memory, instructions

and, for whole programs, which XLA compiles for devices that are described to it:

  topology    the devices of a machine with eight H100s
"""
