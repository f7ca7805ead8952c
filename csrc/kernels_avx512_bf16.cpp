// The kernels for bfloat16 where AVX-512 rounds to it in one instruction. The pragma comes before
// every include: it holds to the end of the file.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define NORMKIT_ISA avx512_bf16
#define NORMKIT_BYTES 64
#define NORMKIT_BFLOAT16
#include "kernels.h"
#endif
