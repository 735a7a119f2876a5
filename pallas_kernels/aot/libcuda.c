// A stand-in for the CUDA driver (libcuda.so.1): as much as compiling a Mosaic GPU module asks for.
//
// It names an sm_90 device, and keeps what the compiler hands over instead of loading it: the cubin
// goes to $STANDIN_CUBIN, the dynamic shared memory of the kernel (bytes) to $STANDIN_SHARED.

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
static void *const HANDLE = (void *)1;

Result cuInit(unsigned flags) { (void)flags; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { (void)ordinal; *device = 0; return 0; }
Result cuDeviceGetName(char *name, int size, int device) {
  (void)device;
  snprintf(name, size, "stand-in sm_90");
  return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: *value = 9; break;        // compute capability, major
    case 76: *value = 0; break;        // and minor
    case 16: *value = 132; break;      // multiprocessors
    case 97: *value = 232448; break;   // shared memory of a block, opted in
    case 81: *value = 233472; break;   // of a multiprocessor
    case 8: *value = 49152; break;     // of a block, by default
    case 10: *value = 32; break;       // warp size
    default: *value = 1;
  }
  return 0;
}

Result cuCtxGetCurrent(void **context) { *context = HANDLE; return 0; }
Result cuCtxSetCurrent(void *context) { (void)context; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxSynchronize(void) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) {
  (void)device;
  *context = HANDLE;
  return 0;
}
Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 1;
  return 0;
}
Result cuGetErrorString(int error, const char **text) {
  (void)error;
  *text = "error of the stand-in driver";
  return 0;
}
Result cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }

// An ELF image ends with its section or its program header table.
static size_t elf_size(const unsigned char *elf) {
  uint64_t program, section;
  uint16_t program_size, programs, section_size, sections;
  memcpy(&program, elf + 32, 8);
  memcpy(&section, elf + 40, 8);
  memcpy(&program_size, elf + 54, 2);
  memcpy(&programs, elf + 56, 2);
  memcpy(&section_size, elf + 58, 2);
  memcpy(&sections, elf + 60, 2);
  uint64_t a = section + (uint64_t)section_size * sections;
  uint64_t b = program + (uint64_t)program_size * programs;
  return a > b ? a : b;
}

Result cuModuleLoadData(void **module, const void *image) {
  const char *path = getenv("STANDIN_CUBIN");
  FILE *file = path && image ? fopen(path, "wb") : NULL;
  if (file) {
    fwrite(image, 1, elf_size(image), file);
    fclose(file);
  }
  *module = HANDLE;
  return 0;
}
Result cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options,
                          void **values) {
  (void)n; (void)options; (void)values;
  return cuModuleLoadData(module, image);
}
Result cuLibraryLoadData(void **library, const void *image, void *a, void *b, unsigned c, void *d,
                         void *e, unsigned f) {
  (void)a; (void)b; (void)c; (void)d; (void)e; (void)f;
  return cuModuleLoadData(library, image);
}
Result cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module; (void)name;
  *function = HANDLE;
  return 0;
}
Result cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  return cuModuleGetFunction(kernel, library, name);
}
Result cuModuleUnload(void *module) { (void)module; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)attribute; (void)function;
  *value = 0;
  return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function;
  const char *path = getenv("STANDIN_SHARED");
  FILE *file = path && attribute == 8 ? fopen(path, "w") : NULL;  // largest dynamic shared memory
  if (file) {
    fprintf(file, "%d\n", value);
    fclose(file);
  }
  return 0;
}
Result cuTensorMapEncodeTiled(void *map) { (void)map; return 0; }

// The two functions of Mosaic GPU's runtime library that a compiled module's host side names. They
// are linked, never called; $MOSAIC_GPU_RUNTIME_LIB_PATH points here.
void mosaic_gpu_init_tma_desc(void) {}
void mosaic_gpu_launch_kernel(void) {}

extern void *dlsym(void *, const char *);
Result cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags,
                           int *status) {
  (void)version; (void)flags;
  *address = dlsym(NULL, name);
  if (status) *status = *address ? 0 : 1;
  return *address ? 0 : 500;
}
Result cuGetProcAddress(const char *name, void **address, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, address, version, flags, NULL);
}
