// Entry points of the kernels that work on one rank's rows alone.
#include "collapse.cuh"
#include "copy.cuh"
#include "dequantise.cuh"
#include "expand.cuh"
#include "order.cuh"

/// One block, of up to 16 warps.
KERNEL(expert_order, ExpertOrderParams) { railhop::order_rows(p); }

KERNEL(expand, ExpandParams) { railhop::expand_rows(p); }

KERNEL(collapse, CollapseParams) { railhop::collapse_rows(p); }

KERNEL(dequantise, DequantiseParams) { railhop::dequantise_rows(p); }

KERNEL(copy, CopyParams) { railhop::copy_bytes(p); }
