// The one translation unit of kernel code: RAILHOP_KERNELS may name another file, such as the self-test's kernels or a
// changed copy.
#ifndef RAILHOP_KERNELS
#define RAILHOP_KERNELS "../railhop.cu"
#endif
#include RAILHOP_KERNELS
