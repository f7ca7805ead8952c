// The kernels for avx2. The pragma comes before every include: it holds to the end of the file.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define NORMKIT_ISA avx2
#define NORMKIT_BYTES 32
#include "kernels.h"
#endif
