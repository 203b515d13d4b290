/* The kernels for aarch64 with dot products of bytes (Armv8.2 and later: Cortex-A76, Neoverse, Jetson Orin, Apple's). */
#include "native.h"

#if defined(HAS_DOT_KERNELS)
#if defined(__clang__)
#include <arm_neon.h>
#include <math.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define ISA_DOTPROD 1
#define KERNELS_TABLE kernels_dotprod
#define KERNELS_NAME "dotprod"
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
