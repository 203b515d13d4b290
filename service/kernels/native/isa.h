/* Every kernel, compiled for the instruction set that the including file asks for, and the table of them. */
#include "elementwise.h"

const struct kernels KERNELS_TABLE = {
    .name = KERNELS_NAME,
    .add_rms_norm = add_rms_norm,
    .swiglu = swiglu,
};
