// The kernels for every processor.
#define NORMKIT_ISA portable
#include "kernels.h"
