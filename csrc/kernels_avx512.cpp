// The kernels for avx512. The pragma comes before every include: it holds to the end of the file.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define NORMKIT_ISA avx512
#define NORMKIT_BYTES 64
#include "kernels.h"
#endif
