// The kernels for every processor.
#define NORMKIT_ISA portable
#define NORMKIT_BYTES 16
#include "kernels.h"
