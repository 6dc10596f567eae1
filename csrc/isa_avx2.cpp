#define TOKENLOOM_ISA avx2
#define TOKENLOOM_ISA_NAME "AVX2"
#include "kernels.inl"
